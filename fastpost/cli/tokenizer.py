"""Loads the tokenizer that a flag or a recipe names."""

from __future__ import annotations

from typing import Any

from fastpost.cli.recipe import UsageError

__all__ = ["load_tokenizer"]


def load_tokenizer(model: str, field: str) -> Any:
    """The tokenizer of a folder or a name; `field` is where the name came from.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer  # heavy

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{field}: {model} has no tokenizer: {error}") from error
