"""Who samples for GRPO and RLOO: TRL's own completions, a copy's, vLLM's, and how far apart they
are from the model that learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaForCausalLM

import fastpost
from fastpost.rollout.cast_copy import CastCopy
from fastpost.rollout.vllm_rollout import VLLMRollout
from fastpost.scoring import FastpostWarning
from tests.trainers.fixed_samples import FixedSamples, uneven_reward
from tests.trainers.group_runs import GROUP, LORA, SETTINGS, model_from_folder

METHODS = {
    "grpo": (fastpost.GRPOTrainer, fastpost.GRPOConfig, trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (fastpost.RLOOTrainer, fastpost.RLOOConfig, trl.RLOOTrainer, trl.RLOOConfig),
}
OPTIONS = {"reward_funcs": uneven_reward}
FIGURES = {"rollout/kl", "rollout/kl_k1", "rollout/ess", "rollout/p99_ratio", "rollout/max_ratio"}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, tokenizer) -> LlamaForCausalLM:
    return model_from_folder(tmp_path_factory.mktemp("policy"), len(tokenizer))


@pytest.fixture(scope="session")
def prompts(preference_data) -> Dataset:
    return preference_data.select_columns(["prompt"])


def recording(trainer_class: type[Any]) -> tuple[type[Any], list[Any]]:
    """The trainer, and the completions it learns from."""
    seen: list[Any] = []

    def generate(trainer: Any, prompts: Any) -> Any:
        result = trainer_class._generate(trainer, prompts)
        seen.append(copy.deepcopy(result[1]))
        return result

    members = {"_generate": generate, "__module__": trainer_class.__module__}
    return type(trainer_class.__name__, (trainer_class,), members), seen


@pytest.mark.parametrize("method", METHODS)
def test_samples_what_trl_would_sample(method, saved_model, prompts, run_trainer) -> None:
    ours, config, stock, stock_config = METHODS[method]
    runs = []
    for trainer_class, config_class in ((ours, config), (stock, stock_config)):
        trainer_class, seen = recording(trainer_class)
        run_trainer(
            trainer_class,
            config_class,
            saved_model,
            prompts,
            OPTIONS,
            **SETTINGS | {"max_steps": 2},
        )
        runs.append(seen)
    assert len(runs[0]) == 2 and runs[0] == runs[1]


@pytest.mark.parametrize(
    ("method", "options"), [("grpo", {"peft_config": LORA}), ("rloo", {})], ids=["lora", "full"]
)
def test_a_bf16_copy_differs_a_little_and_is_measured(
    method, options, saved_model, prompts, run_trainer
) -> None:
    trainer_class, config_class, *_ = METHODS[method]
    config = SETTINGS | {"rollout_dtype": "bfloat16", "rollout_mismatch_limit": 0.01}
    trainer = run_trainer(
        trainer_class, config_class, saved_model, prompts, OPTIONS | options, **config
    )
    assert trainer.rollout.copy.model.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    for log in trainer.trace.logs:
        assert log.keys() >= FIGURES
        assert 0 < log["rollout/kl"] < 0.01
        assert 0.9 < log["rollout/ess"] < 1
        assert 1 < log["rollout/p99_ratio"] <= log["rollout/max_ratio"] < 1.5
    assert not trainer.engine.fallbacks


@pytest.mark.parametrize("method", METHODS)
def test_the_model_itself_is_at_no_distance(method, saved_model, prompts, run_trainer) -> None:
    """Sampled and scored by the same fp32 weights, with two updates a rollout."""
    trainer_class, config_class, *_ = METHODS[method]
    config = SETTINGS | {"rollout_mismatch_limit": 1e-6, "num_iterations": 2, "max_steps": 4}
    trainer = run_trainer(trainer_class, config_class, saved_model, prompts, OPTIONS, **config)
    assert max(log.get("rollout/kl", 0) for log in trainer.trace.logs) < 1e-9
    assert "rollout/ess" in trainer.trace.logs[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_stale_copy_stops_the_run(method, saved_model, prompts, run_trainer, monkeypatch) -> None:
    refresh = CastCopy.refresh

    def refresh_once(self: CastCopy, trained: Any) -> Any:
        return refresh(self, trained) if self.model is None else self.model

    monkeypatch.setattr(CastCopy, "refresh", refresh_once)
    trainer_class, config_class, *_ = METHODS[method]
    config = {"rollout_dtype": "float32", "rollout_mismatch_limit": 0.01, "learning_rate": 0.05}
    with pytest.raises(RuntimeError, match=r"not the one that learns: KL .* stale weights"):
        run_trainer(trainer_class, config_class, saved_model, prompts, OPTIONS, **SETTINGS | config)


def test_without_a_reason_nothing_is_measured(saved_model, prompts, run_trainer) -> None:
    trainer = run_trainer(
        fastpost.GRPOTrainer, fastpost.GRPOConfig, saved_model, prompts, OPTIONS, **SETTINGS
    )
    assert trainer.mismatch is None and not FIGURES & trainer.trace.logs[0].keys()


def test_continuous_batching_leaves_the_trained_weights_in_fp32(
    saved_model, prompts, run_trainer
) -> None:
    """With bf16=True TRL would have cast them for good."""
    config = SETTINGS | {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
        "bf16": True,
        "rollout_dtype": "float32",
        "max_steps": 1,
    }
    trainer = run_trainer(
        fastpost.GRPOTrainer, fastpost.GRPOConfig, saved_model, prompts, OPTIONS, **config
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert 0 < trainer.trace.logs[0]["rollout/kl"] < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_vllm_samples_are_measured(method, saved_model, prompts, run_trainer, monkeypatch) -> None:
    """A driver that answers every prompt alike stands for vLLM."""

    class Driver:
        def __init__(self, logprobs: int | None, **settings: Any) -> None:
            self.synced = 0
            self.logprobs = logprobs

        def sync_weights(self) -> None:
            self.synced += 1

        def generate(self, prompts: Any, num_generations: int, **_: Any) -> Any:
            assert num_generations == GROUP and self.logprobs == 0
            completions = [[10 + i % GROUP, 11, 12 + i % 3] for i in range(len(prompts))]
            return prompts, completions, [[[-5.0], [-5.5], [None]] for _ in prompts], None

    trainer_class, config_class, *_ = METHODS[method]
    monkeypatch.setattr(trainer_class._trl_module, "VLLMGeneration", Driver)
    monkeypatch.setattr("fastpost.trainers.group_trainer.require_vllm", lambda: None)
    config = SETTINGS | {"use_vllm": True, "vllm_mode": "colocate"}
    trainer = run_trainer(trainer_class, config_class, saved_model, prompts, OPTIONS, **config)
    assert isinstance(trainer.rollout, VLLMRollout) and trainer.vllm_generation.synced == 3
    for log in trainer.trace.logs:
        assert log["rollout/kl"] > 0
        # TRL's own correction for what vLLM samples otherwise, which only GRPO has.
        assert ("sampling/importance_sampling_ratio/mean" in log) == (method == "grpo")


def grpo(model: Any, tokenizer: Any, data: Any, folder: Any, **config: Any) -> Any:
    options = {key: config.pop(key) for key in ("tools",) if key in config}
    settings = {"use_cpu": True, "bf16": False, "report_to": []} | SETTINGS | config
    return fastpost.GRPOTrainer(
        copy.deepcopy(model),
        uneven_reward,
        fastpost.GRPOConfig(str(folder), **settings),
        data,
        processing_class=tokenizer,
        **options,
    )


def a_tool(number: int) -> int:
    """Add one.

    Args:
        number: any.

    Returns:
        The number after it.
    """
    return number + 1


def test_what_cannot_be_honoured_is_refused(saved_model, prompts, tokenizer, tmp_path) -> None:
    def refused(error: type[Exception], match: str, data: Any = prompts, **config: Any) -> None:
        with pytest.raises(error, match=match):
            grpo(saved_model, tokenizer, data, tmp_path, **config)

    refused(ImportError, r"pip install 'fastpost\[vllm\]'", use_vllm=True)
    refused(ValueError, "rollout_dtype must be None or one of", rollout_dtype="fp8")
    refused(ValueError, "rollout_mismatch_limit must be positive", rollout_mismatch_limit=0.0)
    refused(ValueError, "train_dataset is empty", data=prompts.select([]))
    refused(
        ValueError,
        "rename 'prompts' to 'prompt'",
        data=prompts.rename_column("prompt", "prompts"),
    )
    refused(
        ValueError,
        "casts the trained weights for good",
        tools=[a_tool],
        use_transformers_continuous_batching=True,
        bf16=True,
    )


@pytest.mark.parametrize("reason", ["multimodal prompts", "tools or environments"])
def test_what_is_not_text_is_sampled_by_trl_and_counted(
    reason, saved_model, prompts, tokenizer, tmp_path, monkeypatch
) -> None:
    trainer = grpo(saved_model, tokenizer, prompts, tmp_path, rollout_dtype="bfloat16")
    asked = []
    monkeypatch.setattr(
        trl.GRPOTrainer, "_generate_single_turn", lambda trainer, *call: asked.append(call)
    )
    fields: dict[str, Any] = {"token_type_ids": [[0, 0]]} if reason == "multimodal prompts" else {}
    if not fields:
        trainer.tools = [a_tool]
    with pytest.warns(FastpostWarning, match=f"TRL's own rollout ran.*{reason}"):
        trainer._generate_single_turn([[5, 6]], None, fields, 2)
    assert asked == [([[5, 6]], None, fields, 2, False)]
    assert [*trainer.engine.fallbacks.values()] == [1] and reason in trainer.engine.report()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_that_of_trl(method, saved_model, prompts, tokenizer, tmp_path) -> None:
    ours, config_class, stock, stock_config = METHODS[method]
    found = []
    for trainer_class, config in ((ours, config_class), (stock, stock_config)):
        trainer = FixedSamples(saved_model.config.vocab_size).grouped(trainer_class)(
            copy.deepcopy(saved_model),
            uneven_reward,
            config(
                str(tmp_path),
                use_cpu=True,
                bf16=False,
                report_to=[],
                beta=0.1,
                eval_strategy="steps",
                num_generations_eval=2,
                per_device_eval_batch_size=4,
                **SETTINGS,
            ),
            prompts,
            prompts.select(range(4)),
            processing_class=tokenizer,
        )
        trainer.model.get_input_embeddings().weight.data.mul_(1.01)  # the reference is another now
        found.append(trainer.evaluate())
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    for name in found[1].keys() - timed:
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5), name
    assert found[0]["eval_reward_std"] > 0 and found[0].keys() == found[1].keys()


def test_a_reference_that_is_not_the_policy_is_warned_of(
    saved_model, prompts, tokenizer, tmp_path
) -> None:
    """TRL loads the reference from the folder the policy came from."""
    trained = copy.deepcopy(saved_model)
    trained.model.norm.weight.data += 0.1
    with pytest.warns(FastpostWarning, match=r"1 tensors, first 'model.norm.weight'.*Save the pol"):
        grpo(trained, tokenizer, prompts, tmp_path, beta=0.1)


def test_a_reference_that_changes_stops_the_run(
    saved_model, prompts, run_trainer, monkeypatch
) -> None:
    step = fastpost.GRPOTrainer.training_step

    def tamper(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.ref_model.model.norm.weight.data += 0.1
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(fastpost.GRPOTrainer, "training_step", tamper)
    with pytest.raises(RuntimeError, match="the reference model changed during training"):
        run_trainer(
            fastpost.GRPOTrainer,
            fastpost.GRPOConfig,
            saved_model,
            prompts,
            OPTIONS,
            **SETTINGS | {"beta": 0.1, "max_steps": 1},
        )
