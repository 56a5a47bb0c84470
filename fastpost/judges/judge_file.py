"""Judges from a YAML file.

    - {name: one, model: gpt-x, endpoint: "https://host/v1/chat/completions", api_key_env: KEY}
    - {model: big-judge, endpoint: "http://127.0.0.1:8000/v1/chat/completions", attempts: 2}
    - {model: ./local-judge, batch_size: 8, weighs_choices: true}

The settings are those of `fastpost.chat_model.model_spec.ModelSpec`. A judge is greedy and brief
where its entry does not say otherwise: temperature 0, at most 256 tokens. `weighs_choices` is the
judge's own (`fastpost.judges.judge.Judge`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.model_spec import ModelSpec
from fastpost.judges.judge import Judge
from fastpost.judges.panel import Panel

__all__ = ["read_judge", "read_judges"]

_DEFAULTS = {"temperature": 0.0, "max_tokens": 256}


def read_judges(path: str | Path, cache: str | Path | None = None) -> list[Judge]:
    """The judges of a file; local ones are loaded.

    Args:
        path: the file.
        cache: folder that keeps their replies; None keeps none.

    Raises:
        ValueError: the file cannot be read, or an entry is wrong; names it.
    """
    try:
        entries = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of judges, such as - {{model: NAME, ...}}")
    judges = []
    for number, entry in enumerate(entries, 1):
        try:
            judges.append(_judge_of(entry, cache))
        except ValueError as error:
            raise ValueError(f"{path}, judge {number}: {error}") from error
    return judges


def read_judge(given: Any) -> Judge | Panel:
    """Who decides: the judge of one entry, or those of a file, several of them as a panel.

    Raises:
        ValueError: as `read_judges`, or a file of two.
    """
    if not isinstance(given, str | Path):
        try:
            return _judge_of(given)
        except ValueError as error:
            raise ValueError(f"judge: {error}") from error
    judges = read_judges(given)
    return judges[0] if len(judges) == 1 else Panel(judges)


def _judge_of(entry: Any, cache: str | Path | None = None) -> Judge:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected {{model: ..., endpoint: ...}}, got {entry!r}")
    own = {key: entry[key] for key in ("name", "weighs_choices") if key in entry}
    settings = _DEFAULTS | {key: value for key, value in entry.items() if key not in own}
    model = ModelSpec.from_mapping(settings).open()
    return Judge(model if cache is None else CachedChatModel(model, cache), **own)
