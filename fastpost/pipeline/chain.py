"""From end to end one template and one tokenizer, and references that stay as they were.

Each trainer checks the model it begins with (`fastpost.guards.template`). Here the whole chain is
held to what it began with: a stage whose model left with another tokenizer or template stops the
run, unless the stage itself sets one (`chat_template_path`, `eos_token`), which then holds on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastpost.guards.template import FILE_NAME, check_fingerprint, save_fingerprint
from fastpost.pipeline.digests import Digests, local_path
from fastpost.pipeline.recipe import RecipeError, Stage

__all__ = ["TemplateChain", "watch_reference"]

_SETS_TEMPLATE = ("chat_template_path", "eos_token")


class TemplateChain:
    """The template and tokenizer of a run, kept in `folder`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "template"

    def begin(self, model: str) -> None:
        """Take the tokenizer of the model that the run starts with.

        Raises:
            ValueError: the run began with another one.
        """
        tokenizer = self._load(model)
        if (self._folder / "start" / FILE_NAME).is_file():
            check_fingerprint(self._folder / "start", tokenizer)
        save_fingerprint(self._folder / "start", tokenizer)
        self._current = self._folder / "start"

    def after(self, stage: Stage, model: Path) -> None:
        """Hold the model of a finished stage to the run's tokenizer.

        Raises:
            ValueError: shows what differs.
        """
        tokenizer = self._load(str(model))
        if any(stage.fields.get(name) is not None for name in _SETS_TEMPLATE):
            self._current = self._folder / stage.name
            save_fingerprint(self._current, tokenizer)
            return
        try:
            check_fingerprint(self._current, tokenizer)
        except ValueError as error:
            raise ValueError(
                f"stage {stage.name} left a model with another tokenizer or template than it was "
                f"given: {error}"
            ) from error

    def _load(self, model: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise RecipeError(f"the tokenizer of {model} cannot be loaded: {error}") from error


def watch_reference(stage: Stage, fields: dict[str, Any], digests: Digests) -> dict[str, str]:
    """Digest of the model that a stage compares with: its `ref_model`, or the one it starts from.

    Asked before and after the stage; nothing may have written into it.
    """
    named = str(fields.get("ref_model") or fields.get("model") or "")
    path = local_path(named)
    return {} if path is None else {"model": named, "sha256": digests.of(path)}
