"""One template and tokenizer from the first model to the last."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastpost.pipeline.chain import TemplateChain
from tests.pipeline.conftest import read

STAGES = read(
    {"stage": "sft", "dataset": "x", "chat_template_path": "other.jinja"},
    {"stage": "dpo", "dataset": "x"},
).stages


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    """The model's tokenizer with another template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template += "{# #}\n"
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_stage_that_changes_the_template_stops_the_run(tiny_model, other, tmp_path) -> None:
    chain = TemplateChain(tmp_path / "run")
    chain.begin(str(tiny_model))
    chain.after(STAGES[1], tiny_model)
    with pytest.raises(ValueError, match="stage dpo left a model with another tokenizer"):
        chain.after(STAGES[1], other)


def test_a_stage_may_set_the_template_which_then_holds(tiny_model, other, tmp_path) -> None:
    chain = TemplateChain(tmp_path / "run")
    chain.begin(str(tiny_model))
    chain.after(STAGES[0], other)
    chain.after(STAGES[1], other)
    with pytest.raises(ValueError, match="another tokenizer or template"):
        chain.after(STAGES[1], tiny_model)


def test_a_run_goes_on_with_the_tokenizer_it_began_with(tiny_model, other, tmp_path) -> None:
    TemplateChain(tmp_path / "run").begin(str(tiny_model))
    TemplateChain(tmp_path / "run").begin(str(tiny_model))
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        TemplateChain(tmp_path / "run").begin(str(other))
