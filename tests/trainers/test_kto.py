"""KTO: the same steps as TRL, the reference in one forward, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

import fastpost
from tests.trainers.test_parity import assert_same_metrics

# LoRA's B starts at zero, so the first gradients of A are rounding noise, which Adam would scale up
# to whole steps of either sign. Plain SGD keeps the comparison about gradients.
SGD = {"optim": "sgd", "learning_rate": 0.1}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
DORA = LoraConfig(
    r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"
)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"beta": 0.5}, {}),
    "apo-zero": ({"loss_type": "apo_zero_unpaired", "beta": 0.5}, {}),
    "weighted": ({"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.5}, {}),
    "precomputed-reference": ({"precompute_ref_log_probs": True}, {}),
    "apo-zero-precomputed": (
        {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True},
        {},
    ),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}, {}),
    "truncated": ({"max_length": 70}, {}),
    "lora": (SGD, {"peft_config": LORA}),
    "dora": (SGD, {"peft_config": DORA}),
    "lora-checkpointing": (SGD | {"gradient_checkpointing": True}, {"peft_config": LORA}),
    "no-sharing": ({"prefix_sharing": False}, {}),
}


def labelled(preference_data: Dataset, pattern: str) -> Dataset:
    """Rows whose labels repeat a pattern: "+" takes the chosen answer, "-" the rejected one."""
    rows = []
    for i, row in enumerate(preference_data):
        label = pattern[i % len(pattern)] == "+"
        completion = row["chosen" if label else "rejected"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": label})
    return Dataset.from_list(rows)


@pytest.fixture
def no_shared_cache():
    """Two runs must not read one another's precomputed log-probs from the data set's cache."""
    datasets.disable_caching()
    yield
    datasets.enable_caching()


@pytest.fixture
def reference(model) -> LlamaForCausalLM:
    """Other weights than the policy's: rewards and KL are not zero at the first step."""
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other


def run_both(run_trainer, model, data, options, config) -> tuple[Any, Any]:
    stock_config = {k: v for k, v in config.items() if k != "prefix_sharing"}
    stock = run_trainer(
        trl.KTOTrainer, trl.KTOConfig, model, data, trainer_options=options, **stock_config
    )
    ours = run_trainer(
        fastpost.KTOTrainer, fastpost.KTOConfig, model, data, trainer_options=options, **config
    )
    return ours, stock


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES.keys())
def test_same_steps_as_trl(
    config,
    options,
    model,
    reference,
    preference_data,
    run_trainer,
    assert_same_run,
    no_shared_cache,
) -> None:
    if "peft_config" not in options:
        options = options | {"ref_model": reference}
    ours, stock = run_both(run_trainer, model, labelled(preference_data, "+-"), options, config)
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    stats = ours.engine.stats
    assert stats.scored_tokens < stats.unique_tokens <= stats.row_tokens < stats.padded_tokens


@pytest.mark.parametrize("pattern", ["+", "-", "++++----"])
def test_batches_of_one_label(
    pattern, model, reference, preference_data, run_trainer, assert_same_run
) -> None:
    data = labelled(preference_data, pattern)
    ours, stock = run_both(run_trainer, model, data, {"ref_model": reference}, {})
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    assert ("rewards/rejected" in ours.trace.logs[0]) == (pattern == "-")


def test_paired_data_and_evaluation(
    model, reference, preference_data, run_trainer, assert_same_run
) -> None:
    options = {"ref_model": reference, "eval_dataset": preference_data.select(range(6))}
    ours, stock = run_both(run_trainer, model, preference_data, options, {})
    assert_same_run(ours.trace, stock.trace)
    mine, theirs = ours.evaluate(), stock.evaluate()
    assert mine.keys() == theirs.keys()
    for name in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_logps/rejected"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_before_the_first_update_policy_and_reference_agree_to_the_last_bit(
    model, preference_data, run_trainer
) -> None:
    trainer = run_trainer(
        fastpost.KTOTrainer,
        fastpost.KTOConfig,
        model.bfloat16(),
        labelled(preference_data, "+-"),
        trainer_options={"ref_model": copy.deepcopy(model)},
    )
    first = trainer.trace.logs[0]
    assert (first["loss"], first["kl"]) == (0.5, 0.0)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert trainer.trace.logs[-1]["rewards/margins"] != 0.0


def test_a_reference_that_moves_is_noticed(model, reference, preference_data, run_trainer) -> None:
    class Meddler(fastpost.KTOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                self.ref_model.lm_head.weight.mul_(1.001)
            return super().training_step(*args, **kwargs)

    with pytest.raises(RuntimeError, match="reference model changed during training"):
        run_trainer(
            Meddler,
            fastpost.KTOConfig,
            model,
            labelled(preference_data, "+-"),
            trainer_options={"ref_model": reference},
        )


def test_another_weight_of_bad_answers_would_be_noticed(
    model, reference, preference_data, run_trainer, assert_same_run
) -> None:
    """The comparison above can fail."""
    runs = [
        run_trainer(
            fastpost.KTOTrainer,
            fastpost.KTOConfig,
            model,
            labelled(preference_data, "+-"),
            trainer_options={"ref_model": reference},
            undesirable_weight=weight,
        )
        for weight in (1.0, 1.01)
    ]
    with pytest.raises(AssertionError):
        assert_same_run(runs[0].trace, runs[1].trace)


def test_refusals(model, preference_data, tokenizer, tmp_path) -> None:
    config = fastpost.KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])

    def build(data: Any, **options: Any) -> None:
        fastpost.KTOTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer, **options
        )

    data = labelled(preference_data, "+-")
    with pytest.raises(ValueError, match="rename 'labels' to 'label'"):
        build(data.rename_column("label", "labels"))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        build(data.select([]))
    with pytest.raises(ValueError, match="same object as model"):
        build(data, ref_model=model)
