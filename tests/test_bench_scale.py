"""`bench.scale`: what it traces of stock TRL against arithmetic, and both sides on one batch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from bench.scale import __main__ as command
from bench.scale.bars import BARS
from bench.scale.cases import every_case
from bench.scale.lengths import MAX_LENGTH, as_batch, preference_rows, uniform_rows
from bench.scale.longest import STEP, longest_that_fits
from bench.scale.report import report
from bench.scale.sides import activation_bytes, ours, peak_of_step, stock
from fastpost.planning.ledger import OPTIMIZER, PARAMETERS, REFERENCE, Peak, Window
from fastpost.planning.request import Adapter, Request

LAYERS, HIDDEN, WIDE, VOCAB = 1, 64, 160, 512
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=WIDE,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * WIDE  # elements of the matrices of one layer
COUNT = LAYERS * LAYER + 2 * VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN
PROMPT, ANSWER = 40, 25


def traced(side, method: str, adapter: Adapter | None = None, **options):
    request = Request("tiny", method, seq=PROMPT + ANSWER, adapter=adapter, **options)
    groups, size = {"sft": (4, 1), "dpo": (2, 2), "grpo": (1, 4)}[method]
    batch = as_batch(method, uniform_rows(method, groups, size, PROMPT, ANSWER), VOCAB)
    return side(request, batch, config=CONFIG)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_flops_of_full_trl_are_those_of_padded_rows(method: str) -> None:
    """Forward, recomputation and two products a matrix in the backward, and a reference's forward.

    Recomputation ends with the last tensor that is kept: down_proj's product is not done again. The
    last token of a row, which predicts nothing, is computed; the head scores the answers' alone.
    """
    rows, length = 4, PROMPT + ANSWER
    forwards = 2 if method == "dpo" else 1
    matrices = 2 * rows * length * LAYERS * ((3 + forwards) * LAYER - WIDE * HIDDEN)
    pairs = rows * length * (length + 1) // 2
    attention = 2 * LAYERS * pairs * HIDDEN * (2 * forwards + 2 + 5)
    head = 2 * rows * ANSWER * VOCAB * HIDDEN * (forwards + 3)
    found = traced(stock, method)
    assert found.total_flops == matrices + attention + head
    assert found.flops["attention"] == attention
    assert found.at_rest[PARAMETERS] == 4 * COUNT  # fp32 is TRL's default
    assert found.at_rest[OPTIMIZER] == pytest.approx(8 * COUNT, rel=0.01)
    assert (REFERENCE in found.at_rest) == (method == "dpo")


def test_a_mask_makes_trl_compute_every_pair() -> None:
    rows = preference_rows("sft", 4, 1)
    request = Request("tiny", "sft", seq=64)
    batch = as_batch("sft", rows, VOCAB)
    width = batch["input_ids"].shape[1]
    assert not batch["attention_mask"].all()
    found = stock(request, batch, config=CONFIG)
    assert found.flops["attention"] == 2 * LAYERS * 4 * width * width * HIDDEN * 9


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("dpo", "lora"),
        pytest.param("dpo", "full", marks=pytest.mark.slow),
        pytest.param("grpo", "full", marks=pytest.mark.slow),
        pytest.param("grpo", "qlora", marks=pytest.mark.slow),
    ],
)
def test_ours_computes_shared_prompts_once(method: str, kind: str) -> None:
    adapter = None if kind == "full" else Adapter(kind, 8)
    mine, theirs = traced(ours, method, adapter), traced(stock, method, adapter)
    prompts = 2 if method == "dpo" else 1
    assert theirs.tokens == 4 * (PROMPT + ANSWER)
    assert mine.tokens == prompts * PROMPT + 4 * (ANSWER - 1)
    assert not mine.fallbacks
    # layers of ours over TRL's; neither side's head depends on prompts
    share = mine.tokens / theirs.tokens
    assert share * 0.7 < mine.total_flops / theirs.total_flops < 1
    assert activation_bytes(mine) < activation_bytes(theirs)
    assert mine.num_trained == theirs.num_trained


@pytest.mark.slow
def test_sharding_divides_what_trl_holds_but_not_its_reference_when_gathered() -> None:
    one, four = traced(stock, "dpo"), traced(stock, "dpo", num_gpus=4)
    assert four.total_flops == one.total_flops
    for category in (PARAMETERS, OPTIMIZER, REFERENCE):
        assert four.at_rest[category] == pytest.approx(one.at_rest[category] / 4, rel=0.02)
    gathered = max(peak.held.get("all-gather buffers", 0) for peak in four.windows.values())
    assert gathered > 2 * COUNT  # the whole reference in bf16, as one unit


def test_lengths_are_the_same_every_time_and_within_bounds() -> None:
    rows = preference_rows("dpo", 50, 2)
    assert rows == preference_rows("dpo", 50, 2) != preference_rows("dpo", 50, 2, seed=1)
    assert all(row.prompt + row.answer <= MAX_LENGTH for row in rows)
    assert [row.group for row in rows] == [*range(50), *range(50)]
    batch = as_batch("dpo", rows, VOCAB)
    chosen, rejected = batch["input_ids"].chunk(2)
    assert torch.equal(chosen[0, : rows[0].prompt], rejected[0, : rows[0].prompt])
    assert int((batch["labels"] != -100).sum()) == sum(row.answer for row in rows)
    assert len({str(case) for case in every_case()}) == 27


@pytest.mark.parametrize("bend", [0, 3e-7])
def test_the_longest_row_is_found(bend: float) -> None:
    """Memory that is a line, and one that bends."""
    runs = []

    def run(tokens: int):
        runs.append(tokens)
        held = {"activations": int(1000 + tokens * (2 + bend * tokens))}
        return SimpleNamespace(windows={Window("second step, forward", "", 1): Peak(held, None)})

    usable = 200_000
    found = longest_that_fits(run, usable)
    assert found.tokens in runs and found.tokens % STEP == 0 and len(runs) <= 6
    assert 0.95 * usable < found.peak_bytes <= usable
    assert peak_of_step(run(found.tokens)).total == found.peak_bytes
    assert longest_that_fits(run, 500).tokens == 0


def test_parts_are_stored_beside_each_other(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    bar = {"bar": "it fits", "found": "1 of 2 GiB", "met": True}
    far = {"model": "8B", "adapter": "full", "way": "TRL", "tokens": 4096, "peak_bytes": 1}
    command.store({"bar": [bar]})
    command.store({"longest": [far]})
    stored = json.loads((tmp_path / "scale.json").read_text())
    assert stored["bar"]["rows"] == [bar] and stored["longest"]["rows"] == [far]
    assert {"machine", "versions", "commit", "command"} <= set(stored["bar"])
    lines = report({part: stored[part]["rows"] for part in stored})
    assert "| it fits | 1 of 2 GiB | met |" in lines and "| 8B full | 4,096 |  |  |" in lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full 32B", "full 70B", "GRPO 32B"])
def test_bars_are_met(name: str) -> None:
    verdicts = BARS[name]()
    assert all(verdict.met for verdict in verdicts), verdicts
