"""The example learns on a real model: held-out pairs come apart, also after loading it again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpost.pooling import accelerate_pooled

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward_model.py"


@pytest.mark.slow(minutes=3)
def test_the_example_tells_sorted_lists_from_wrong_ones(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("reward_model_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    before, after = example.train(str(tmp_path))
    print(f"held-out pairs ranked right: {before:.1%} before, {after:.1%} after")
    assert before < 0.7
    assert after >= 0.8

    # What a reader of the folder gets, on problems that neither side of the run has seen.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    engine = accelerate_pooled(model.requires_grad_(False))
    rows = example.pairs(100, 77, held_out=True, wrong_answers=1)
    rewards = []
    for side in ("chosen", "rejected"):
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False) for row in rows
        ]
        inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            rewards.append(model(**inputs).logits[:, 0])
    assert engine.packed_forwards == 2 and not engine.fallbacks
    assert float((rewards[0] > rewards[1]).float().mean()) >= 0.8
