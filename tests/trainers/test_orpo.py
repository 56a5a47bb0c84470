"""ORPO: the same steps as TRL, no logits anywhere, empty answers, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration
from trl.import_utils import TRLExperimentalWarning

import fastpost
from tests.trainers.conftest import tiny_model
from tests.trainers.test_parity import SKIPPED_METRICS, assert_same_metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import orpo as trl_orpo

# LoRA's B starts at zero, so the first gradients of A are rounding noise, which Adam would scale up
# to whole steps of either sign. Plain SGD keeps the comparison about gradients.
SGD = {"optim": "sgd", "learning_rate": 0.1}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "beta": ({"beta": 1.0}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "truncated": ({"max_length": 75}, {}),
    "lora": (SGD, {"peft_config": LORA}),
    "lora-checkpointing": (SGD | {"gradient_checkpointing": True}, {"peft_config": LORA}),
    "no-sharing": ({"prefix_sharing": False}, {}),
}


def without_logits(trace: Any) -> Any:
    """The metrics that must agree: TRL's mean logits include prompts and padding."""
    for log in trace.logs:
        del log["logits/chosen"], log["logits/rejected"]
    return trace


def run_both(run_trainer, model, data, options, config) -> tuple[Any, Any]:
    stock_config = {k: v for k, v in config.items() if k != "prefix_sharing"}
    stock = run_trainer(
        trl_orpo.ORPOTrainer, trl_orpo.ORPOConfig, model, data, options, **stock_config
    )
    ours = run_trainer(fastpost.ORPOTrainer, fastpost.ORPOConfig, model, data, options, **config)
    return ours, stock


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES.keys())
def test_same_steps_as_trl(
    config, options, model, preference_data, run_trainer, assert_same_run
) -> None:
    ours, stock = run_both(run_trainer, model, preference_data, options, config)
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(without_logits(ours.trace), without_logits(stock.trace))
    assert len(ours.trace.logs[0].keys() - SKIPPED_METRICS) >= 9
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    stats = ours.engine.stats
    assert max(stats.unique_tokens, stats.scored_tokens) <= stats.row_tokens < stats.padded_tokens
    assert (stats.unique_tokens < 0.8 * stats.row_tokens) == config.get("prefix_sharing", True)


def test_mixture_of_experts(tokenizer, preference_data, run_trainer, assert_same_run) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    ours, stock = run_both(run_trainer, model, preference_data, {}, {})
    assert ours.aux_loss_enabled
    assert_same_run(ours.trace, stock.trace)
    # The loss has the part that no metric shows.
    log = ours.trace.logs[0]
    without = log["nll_loss"] - ours.beta * log["log_odds_ratio"]
    assert ours.trace.losses[0] > without + 0.1


def test_evaluation(model, preference_data, run_trainer) -> None:
    options = {"eval_dataset": preference_data.select(range(6))}
    ours, stock = run_both(run_trainer, model, preference_data, options, {"max_steps": 1})
    mine, theirs = ours.evaluate(), stock.evaluate()
    assert mine.keys() == theirs.keys()
    for name in ("eval_loss", "eval_nll_loss", "eval_log_odds_chosen", "eval_rewards/margins"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_mean_logits_are_of_answer_tokens(model, preference_data, run_trainer) -> None:
    trainer = run_trainer(
        fastpost.ORPOTrainer, fastpost.ORPOConfig, model, preference_data, max_steps=1
    )
    batch = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[i] for i in (0, 5)])
    )
    with torch.no_grad():
        found = trainer.concatenated_forward(trainer.model, batch)
        for logit, side in zip(found[2:4], ("chosen", "rejected"), strict=True):
            stock = trainer.model(
                batch[f"{side}_input_ids"], attention_mask=batch[f"{side}_attention_mask"]
            )
            is_answer = batch[f"{side}_labels"][:, 1:] != -100
            torch.testing.assert_close(logit, stock.logits[:, :-1][is_answer].mean())


def test_an_empty_answer_has_no_nan(model, preference_data, run_trainer) -> None:
    # Truncation leaves no answer where the prompt fills max_length, in some rows of a batch.
    config = {"max_length": 52, "per_device_train_batch_size": 8}
    trainer = run_trainer(
        fastpost.ORPOTrainer, fastpost.ORPOConfig, model, preference_data, **config
    )
    lengths = [sum(t != -100 for t in row) for row in trainer.train_dataset["chosen_labels"]]
    assert min(lengths) == 0 < max(lengths)
    assert torch.isfinite(torch.tensor(trainer.trace.losses)).all()
    assert all(torch.isfinite(weight).all() for weight in trainer.trace.weights.values())
    assert any(gradient.norm() > 0 for gradient in trainer.trace.gradients.values())


VOCABULARY = 16_384


def largest_allocation(run: Any) -> int:
    """Bytes of the largest block that CPU memory was asked for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "stock"])
def test_nothing_as_large_as_tokens_times_vocabulary(is_ours, preference_data, run_trainer) -> None:
    # The head's gradient [V, H] and workspace are allowed; logits of the scored tokens are not.
    model = tiny_model(VOCABULARY, hidden_size=32, num_hidden_layers=1)
    config = {"max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd"}
    if is_ours:
        classes = (fastpost.ORPOTrainer, fastpost.ORPOConfig)
        config["memory_budget_gb"] = 2**-10
    else:
        classes = (trl_orpo.ORPOTrainer, trl_orpo.ORPOConfig)
    trainer = run_trainer(*classes, model, preference_data, **config)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    answers = sum(int((batch[f"{side}_labels"] != -100).sum()) for side in ("chosen", "rejected"))
    largest = largest_allocation(lambda: trainer.training_step(trainer.model, batch))
    assert (largest < answers * VOCABULARY * 4) == is_ours
    if is_ours:
        assert largest <= 4 * VOCABULARY * 32
        assert not trainer.engine.fallbacks


def test_refusals(model, preference_data, tokenizer, tmp_path) -> None:
    config = fastpost.ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])

    def build(model: Any, data: Any = preference_data, **options: Any) -> None:
        fastpost.ORPOTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer, **options
        )

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    with pytest.raises(ValueError, match="decoder-only models, got an encoder-decoder"):
        build(t5)
    with pytest.raises(ValueError, match="ORPO needs the model itself"):
        build(None, model_init=lambda: model)
    with pytest.raises(ValueError, match="rename 'choosen' to 'chosen'"):
        build(model, preference_data.rename_column("chosen", "choosen"))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        build(model, preference_data.select([]))
