"""The same samples give the same gradient however they are cut into batches and laid out.

Not so by definition, and therefore not asked for here: KTO's estimate of the KL and the mean-based
thresholds and orders of BCO and AOT are over a micro-batch; the NLL of CPO and ORPO and GRPO's
"bnpo" are means over the tokens of a micro-batch, so they are cut only where all rows have one
length. Metrics that are means over the tokens of a micro-batch (entropy, accuracy, mean logits, and
KTO's over its liked rows) are averaged over micro-batches by TRL; the others must agree.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.trainers import footprint, methods
from tests.trainers.distributed_child import FixedRollout, equal_lengths
from tests.trainers.methods import METHODS, NUM_ROWS

# Rows of one optimizer step. Groups of two completions stay in one micro-batch.
ROLLOUT_ROWS = 8
ON_POLICY = {"GRPO", "RLOO", "OnlineDPO", "PPO"}
NO_HEAD = {"Reward", "PRM"}
# Methods whose loss is a mean over rows or over all tokens of the step, and what makes it so.
CUTTABLE: dict[str, dict[str, Any]] = {
    "SFT": {},
    "SFT-dft": {"loss_type": "dft"},
    "DPO": {},
    "DPO-ipo": {"loss_type": "ipo"},
    "DPO-weighted": {"use_weighting": True},
    "KTO": {"loss_type": "apo_zero_unpaired"},
    "CPO": {"cpo_alpha": 0.0},
    "CPO-equal-lengths": {},
    "ORPO-equal-lengths": {},
    "Reward": {},
    "PRM": {},
    "GRPO": {"beta": 0.1},
    "GRPO-mean-of-rows": {"loss_type": "grpo"},
    "GRPO-dr": {"loss_type": "dr_grpo"},
    "RLOO": {},
    "OnlineDPO": {},
    "PPO": {},
}
FAST = {"SFT", "DPO", "GRPO"}
SHARED_METRICS = ("rewards/", "logps/", "reward", "objective/scores")


def marked(names: Any) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow(minutes=0.05), id=name)
        for name in names
    ]


def run(
    case: str,
    folder: Path,
    *,
    cut: int = 1,
    data: Dataset | None = None,
    pads_left: bool = False,
    **config: Any,
) -> dict[str, Any]:
    """Gradients and metrics of one optimizer step over all rows, in float64."""
    name = case.split("-")[0]
    method = METHODS[name]
    rows = ROLLOUT_ROWS if name in ON_POLICY else NUM_ROWS
    if data is None:
        data = equal_lengths(method) if case.endswith("equal-lengths") else method.data()
    settings = methods.settings_of(
        method,
        folder / name,
        per_device_train_batch_size=rows // cut,
        gradient_accumulation_steps=cut,
        learning_rate=1e-9,
        **{**CUTTABLE.get(case, {}), **config},
    )
    model = method.model()
    model.config._name_or_path = str(methods.saved_model(name, folder))
    model = model.double()
    trainer = methods.build_trainer(method, settings, model, data, **method.options(torch.float64))
    if name in ON_POLICY:
        trainer.rollout = FixedRollout()
        if getattr(trainer, "ref_model", None) is not None:
            trainer.ref_model.double()
    if pads_left:
        trainer.data_collator = LeftPadding(trainer.data_collator)
    found = footprint.run(trainer, footprint.Watch())
    assert trainer.engine.packed_forwards and not trainer.engine.fallbacks
    trainer.engine.remove()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("invariance")


@cache
def whole(case: str, folder: Path) -> dict[str, Any]:
    """The run that the others are compared with: one batch of all rows."""
    return run(case, folder)


class LeftPadding:
    """A collator's batch with every row's padding in front."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        for mask_name in [name for name in batch if name.endswith("attention_mask")]:
            prefix = mask_name.removesuffix("attention_mask")
            order = batch[mask_name].argsort(dim=1, stable=True)
            for name, value in batch.items():
                is_table = isinstance(value, torch.Tensor) and value.shape == order.shape
                if is_table and name.startswith(prefix):
                    batch[name] = value.gather(1, order)
        return batch


def assert_same(one: dict[str, Any], other: dict[str, Any], with_metrics: bool = True) -> None:
    assert one["gradients"].keys() == other["gradients"].keys()
    assert any(gradient.norm() > 0 for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert gradient.dtype == torch.float64
        error = (gradient - other["gradients"][name]).norm()
        assert error <= 1e-6 * gradient.norm() + 1e-12, name
    for name, value in one["metrics"][0].items():
        if name == "loss" or (with_metrics and name.startswith(SHARED_METRICS)):
            # Sums of fp32 numbers, where a metric is kept in fp32.
            assert other["metrics"][0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("cut", [2, 4])
@pytest.mark.parametrize("case", marked(CUTTABLE))
def test_micro_batches(case, cut, folder) -> None:
    # KTO's metrics are means over the liked rows of a micro-batch, however many those are.
    found = whole(case, folder), run(case, folder, cut=cut)
    assert_same(*found, with_metrics=case != "KTO")


@pytest.mark.parametrize("case", marked(["SFT", "DPO", "KTO", "CPO", "Reward", "PRM"]))
def test_one_by_one(case, folder) -> None:
    found = whole(case, folder), run(case, folder, cut=NUM_ROWS)
    assert_same(*found, with_metrics=case != "KTO")


LAYOUTS = {
    "no-sharing": {"prefix_sharing": False},
    "checkpointing": {"gradient_checkpointing": True},
    "small-head-workspace": {"memory_budget_gb": 1e-5},
    "padded-to-64": {"pad_to_multiple_of": 64},
}


def layouts() -> list[Any]:
    cases = []
    for name in METHODS:
        fields = METHODS[name].config_class.__dataclass_fields__
        for layout, config in LAYOUTS.items():
            has_option = config.keys() <= fields.keys()
            if has_option and not (name in NO_HEAD and layout == "small-head-workspace"):
                marks = () if name in FAST else pytest.mark.slow(minutes=0.05)
                cases.append(pytest.param(name, config, marks=marks, id=f"{name}-{layout}"))
    return cases


@pytest.mark.parametrize(("name", "config"), layouts())
def test_layout(name, config, folder) -> None:
    assert_same(whole(name, folder), run(name, folder, **config))


@pytest.mark.parametrize("name", marked(["SFT", "DPO", "KTO", "Reward", "PRM"]))
def test_side_of_padding(name, folder) -> None:
    left = run(name, folder, pads_left=True)
    assert not left["batches"][0]["attention_mask"][:, 0].all()
    assert_same(whole(name, folder), left)


@pytest.mark.parametrize("case", marked(c for c in CUTTABLE if c.split("-")[0] not in ON_POLICY))
def test_order_of_rows(case, folder) -> None:
    method = METHODS[case.split("-")[0]]
    data = equal_lengths(method) if case.endswith("equal-lengths") else method.data()
    backwards = data.select(list(reversed(range(NUM_ROWS))))
    assert_same(run(case, folder, data=data), run(case, folder, data=backwards))


def test_packed_rows(folder) -> None:
    assert_same(
        whole("SFT", folder),
        run("SFT", folder, packing=True, max_length=512),
    )


def test_other_samples_give_another_gradient(folder) -> None:
    data = METHODS["DPO"].data()
    other = copy.copy(data).select([*range(1, NUM_ROWS), 1])
    with pytest.raises(AssertionError):
        assert_same(run("DPO", folder, data=data), run("DPO", folder, data=other))


def test_estimates_over_a_micro_batch_are_noticed(folder) -> None:
    """KTO's KL is such an estimate: cutting the batch changes the loss, by its definition."""
    config = {"loss_type": "kto", "desirable_weight": 1.0}
    with pytest.raises(AssertionError):
        assert_same(run("KTO", folder, **config), run("KTO", folder, cut=4, **config))
