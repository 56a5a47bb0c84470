"""A tiny model with a real tokenizer, and recipes in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastpost.pipeline.recipe import Pipeline
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def read(*stages: dict[str, Any], **top: Any) -> Pipeline:
    """A pipeline of these stages."""
    given = {"model": "org/model", "output_dir": "runs/x", "stages": list(stages), **top}
    return Pipeline.read(given, "r.yaml")
