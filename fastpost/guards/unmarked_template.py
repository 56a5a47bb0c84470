"""TRL lets `assistant_only_loss` through for templates that neither it nor anybody marks.

With `assistant_only_loss=True` and a template without generation markers, `trl.SFTTrainer` looks up
a marked version of the template and raises where it knows none. The rows can be marked without
(see `assistant_rows`), so during construction that lookup may find nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from trl import chat_template_utils

from fastpost.guards.assistant_rows import end_of_turn


def is_unmarked(tokenizer: Any) -> bool:
    """Whether neither the template nor a version of it that TRL knows has generation markers."""
    return (
        not chat_template_utils.has_generation_markers(tokenizer.chat_template)
        and _training_template(tokenizer) is None
    )


def _training_template(tokenizer: Any) -> str | None:
    """TRL's marked version of the template; None where it has none or none is needed."""
    try:
        return chat_template_utils.get_training_chat_template(tokenizer)
    except ValueError:
        return None


def _is_stop_token_trained(tokenizer: Any, chat_template: str | None = None) -> bool:
    if chat_template is None and is_unmarked(tokenizer):
        return end_of_turn(tokenizer) is not None
    return chat_template_utils.is_chat_template_stop_token_trained(
        tokenizer, chat_template=chat_template
    )


@contextmanager
def unmarked_templates_allowed(trl_module: ModuleType) -> Iterator[None]:
    """While a trainer is constructed, swap the two names of its module that ask for markers.

    Args:
        trl_module: `trl.trainer.sft_trainer`.
    """
    swapped = {
        "get_training_chat_template": _training_template,
        "is_chat_template_stop_token_trained": _is_stop_token_trained,
    }
    stock = {name: getattr(trl_module, name) for name in swapped}
    for name, function in swapped.items():
        setattr(trl_module, name, function)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(trl_module, name, function)


__all__ = ["is_unmarked", "unmarked_templates_allowed"]
