"""Judges from a YAML file.

    - {name: one, model: gpt-x, endpoint: "https://host/v1/chat/completions", api_key_env: KEY}
    - {model: big-judge, endpoint: "http://127.0.0.1:8000/v1/chat/completions", attempts: 2}
    - {model: ./local-judge, batch_size: 8, weighs_choices: true}

The settings are those of `fastpost.chat_model.model_spec.ModelSpec`. A judge is greedy and brief
where its entry does not say otherwise: temperature 0, at most 256 tokens. `weighs_choices` is the
judge's own (`fastpost.judges.judge.Judge`).
"""

from __future__ import annotations

from pathlib import Path

import yaml

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.model_spec import ModelSpec
from fastpost.judges.judge import Judge

__all__ = ["read_judges"]

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
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, judge {number}: expected {{model: ..., ...}}, got {entry!r}")
        own = {key: entry[key] for key in ("name", "weighs_choices") if key in entry}
        settings = _DEFAULTS | {key: value for key, value in entry.items() if key not in own}
        try:
            model = ModelSpec.from_mapping(settings).open()
            judges.append(Judge(model if cache is None else CachedChatModel(model, cache), **own))
        except ValueError as error:
            raise ValueError(f"{path}, judge {number}: {error}") from error
    return judges
