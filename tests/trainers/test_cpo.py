"""CPO and SimPO: the same steps as TRL, no logits anywhere, empty answers, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import BartConfig, BartForConditionalGeneration
from trl.import_utils import TRLExperimentalWarning

import fastpost
from tests.trainers.conftest import tiny_model
from tests.trainers.test_parity import SKIPPED_METRICS, assert_same_metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import cpo as trl_cpo

# LoRA's B starts at zero, so the first gradients of A are rounding noise, which Adam would scale up
# to whole steps of either sign. Plain SGD keeps the comparison about gradients.
SGD = {"optim": "sgd", "learning_rate": 0.01}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
SIMPO = {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "hinge": ({"loss_type": "hinge"}, {}),
    "ipo": ({"loss_type": "ipo"}, {}),
    "simpo": (SIMPO | {"simpo_gamma": 0.7}, {}),
    "simpo-with-nll": ({"loss_type": "simpo", "beta": 2.0}, {}),
    "alphapo": ({"loss_type": "alphapo", "alpha": 0.25, "beta": 0.5}, {}),
    "no-nll": ({"cpo_alpha": 0.0}, {}),
    "nll-weight": ({"cpo_alpha": 0.3}, {}),
    "label-smoothing": ({"label_smoothing": 0.1}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "truncated": ({"max_length": 75}, {}),
    "lora": (SGD, {"peft_config": LORA}),
    "simpo-lora-checkpointing": (
        SGD | SIMPO | {"gradient_checkpointing": True},
        {"peft_config": LORA},
    ),
    "no-sharing": ({"prefix_sharing": False}, {}),
}


def without_logits(trace: Any) -> Any:
    """The metrics that must agree: TRL's mean logits include prompts and padding."""
    for log in trace.logs:
        del log["logits/chosen"], log["logits/rejected"]
    return trace


def run_both(run_trainer, model, data, options, config) -> tuple[Any, Any]:
    stock_config = {k: v for k, v in config.items() if k != "prefix_sharing"}
    stock = run_trainer(trl_cpo.CPOTrainer, trl_cpo.CPOConfig, model, data, options, **stock_config)
    ours = run_trainer(fastpost.CPOTrainer, fastpost.CPOConfig, model, data, options, **config)
    return ours, stock


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES.keys())
def test_same_steps_as_trl(
    config, options, model, preference_data, run_trainer, assert_same_run
) -> None:
    ours, stock = run_both(run_trainer, model, preference_data, options, config)
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(without_logits(ours.trace), without_logits(stock.trace))
    assert len(ours.trace.logs[0].keys() - SKIPPED_METRICS) >= 7
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    stats = ours.engine.stats
    assert stats.scored_tokens < stats.unique_tokens <= stats.row_tokens < stats.padded_tokens
    assert (stats.unique_tokens < 0.8 * stats.row_tokens) == config.get("prefix_sharing", True)


def test_evaluation(model, preference_data, run_trainer) -> None:
    options = {"eval_dataset": preference_data.select(range(6))}
    ours, stock = run_both(run_trainer, model, preference_data, options, SIMPO | {"max_steps": 1})
    mine, theirs = ours.evaluate(), stock.evaluate()
    assert mine.keys() == theirs.keys()
    for name in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_simpo_by_hand(model, preference_data, run_trainer) -> None:
    """The loss of one batch from logits in float64, with no part of TRL in between."""
    trainer = run_trainer(
        fastpost.CPOTrainer,
        fastpost.CPOConfig,
        model,
        preference_data,
        max_steps=1,
        simpo_gamma=0.7,
        **SIMPO,
    )
    rows = [trainer.train_dataset[i] for i in (1, 7, 11)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    found, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    engine, double = trainer.engine, trainer.model.double()
    engine.remove()
    losses = []
    with torch.no_grad():
        for row in rows:
            means = []
            for side in ("chosen", "rejected"):
                ids = torch.tensor([row[f"{side}_input_ids"]])
                labels = torch.tensor(row[f"{side}_labels"])[1:]
                logps = F.log_softmax(double(ids).logits[0, :-1], -1)
                is_answer = labels != -100
                means.append(logps[is_answer, labels[is_answer]].mean())
            losses.append(-F.logsigmoid(2.0 * (means[0] - means[1]) - 0.7))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("config", [{}, SIMPO, {"loss_type": "ipo"}], ids=["cpo", "simpo", "ipo"])
def test_an_empty_answer_has_no_nan(config, model, preference_data, run_trainer) -> None:
    # Truncation leaves no answer where the prompt fills max_length, in some rows of a batch.
    config = config | {"max_length": 52, "per_device_train_batch_size": 8}
    trainer = run_trainer(fastpost.CPOTrainer, fastpost.CPOConfig, model, preference_data, **config)
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
    config = SIMPO | {"max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd"}
    if is_ours:
        classes = (fastpost.CPOTrainer, fastpost.CPOConfig)
        config["memory_budget_gb"] = 2**-10
    else:
        classes = (trl_cpo.CPOTrainer, trl_cpo.CPOConfig)
    trainer = run_trainer(*classes, model, preference_data, **config)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    answers = sum(int((batch[f"{side}_labels"] != -100).sum()) for side in ("chosen", "rejected"))
    largest = largest_allocation(lambda: trainer.training_step(trainer.model, batch))
    assert (largest < answers * VOCABULARY * 4) == is_ours
    if is_ours:
        assert largest <= 4 * VOCABULARY * 32
        assert not trainer.engine.fallbacks


def test_refusals(model, preference_data, tokenizer, tmp_path) -> None:
    config = fastpost.CPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])

    def build(model: Any, data: Any = preference_data, **options: Any) -> None:
        fastpost.CPOTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer, **options
        )

    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )
    )
    with pytest.raises(ValueError, match="decoder-only models, got an encoder-decoder"):
        build(bart)
    with pytest.raises(ValueError, match="CPO needs the model itself"):
        build(None)
    with pytest.raises(ValueError, match="rename 'reject' to 'rejected'"):
        build(model, preference_data.rename_column("rejected", "reject"))
