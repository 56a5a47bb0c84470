"""PPOTrainer from prompts to log lines: sampling, rewards, invariances, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments

import fastpost
from fastpost.scoring import FastpostWarning

LORA = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
)
CONFIG = {
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def length(completion_ids, **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def data() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "answer": str(2 * i)}
            for i in range(12)
        ]
    )


@pytest.fixture
def make(model, tokenizer, data, tmp_path):
    def build(reward_funcs=length, train_dataset=data, policy=None, options=None, **config) -> Any:
        return fastpost.PPOTrainer(
            copy.deepcopy(model) if policy is None else policy,
            reward_funcs,
            fastpost.PPOConfig(str(tmp_path), **(CONFIG | config)),
            train_dataset,
            processing_class=tokenizer,
            **(options or {}),
        )

    return build


def reward_model(vocab: int, **config: Any) -> Any:
    torch.manual_seed(4)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocab,
        "num_labels": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaForSequenceClassification(LlamaConfig(**(settings | config)))


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_a_run_logs_what_matters(make) -> None:
    trainer = make(num_generations=2, num_ppo_epochs=2, max_steps=4, kl_target=1.0)
    trainer.train()
    logs = logged(trainer)
    rollout = {"reward", "reward_std", "rewards/length/mean", "kl", "kl_per_completion", "kl_coef"}
    rollout |= {"explained_variance", "completions/mean_length", "completions/ended"}
    step = {"entropy", "approx_kl", "ratio", "clip_ratio/low", "clip_ratio/high"}
    step |= {"clip_ratio/value", "loss/policy", "loss/value", "learning_rate", "grad_norm"}
    assert rollout | step <= logs[0].keys() and rollout | step <= logs[2].keys()
    assert step <= logs[1].keys() and not rollout & logs[1].keys()
    assert all(math.isfinite(value) for line in logs for value in line.values())
    first = logs[0]
    assert first["reward"] == first["rewards/length/mean"] == first["completions/mean_length"]
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["kl"] == pytest.approx(
        0, abs=1e-6
    )
    assert first["loss"] == pytest.approx(
        first["loss/policy"] + 0.1 * first["loss/value"], abs=1e-5
    )
    assert trainer.first_step.startswith("old and new policy agree")


def test_reward_functions_get_prompts_completions_and_columns(make, tokenizer) -> None:
    seen = []

    def look(prompts, completions, completion_ids, answer, **rest) -> list[float]:
        seen.append((prompts, completions, completion_ids, answer, rest))
        return [0.0] * len(prompts)

    make([look, length], reward_weights=[1.0, 0.0], num_generations=2, max_steps=1).train()
    ((prompts, completions, ids, answers, rest),) = seen
    assert rest == {} and len(prompts) == 4
    assert prompts[0] == prompts[1] != prompts[2] and answers[0] == answers[1]
    for prompt, completion, tokens, answer in zip(prompts, completions, ids, answers, strict=True):
        assert prompt[0]["content"].split()[0] == str(int(answer) // 2)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert completion == [{"role": "assistant", "content": text}] and 1 <= len(tokens) <= 6


def test_reward_models_are_asked_as_they_were_trained(make, tokenizer) -> None:
    """The conversation under the chat template; frozen, packed, prompts shared."""
    model = reward_model(len(tokenizer))
    stock = copy.deepcopy(model)
    seen = []

    def look(prompts, completions, **_) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    trainer = make([model, look], num_generations=2, max_steps=1)
    trainer.train()
    expected = []
    for prompt, completion in seen:
        text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        expected.append(stock(input_ids=ids).logits.item())
    name = "rewards/LlamaForSequenceClassification/mean"
    assert logged(trainer)[0][name] == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reward_models_from_a_folder(make, tokenizer, tmp_path) -> None:
    """Text prompts: prompt and completion as one text, ended where the completion ended."""
    folder = tmp_path / "scorer"
    reward_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = make(str(folder), Dataset.from_list([{"prompt": f"{i}:"} for i in range(8)]))
    trainer.train()
    assert math.isfinite(logged(trainer)[0]["rewards/scorer/mean"])


def test_samples_come_from_the_whole_distribution(make, model) -> None:
    """What the model's generation config prefers is not what its log-probs describe."""
    rewards = []
    for preferences in ({}, {"top_p": 0.1, "top_k": 2, "min_p": 0.9, "repetition_penalty": 5.0}):
        policy = copy.deepcopy(model)
        policy.generation_config.update(**preferences)
        trainer = make(
            lambda completion_ids, **_: [ids[0] for ids in completion_ids], policy=policy
        )
        trainer.train()
        rewards.append([line.get("reward") for line in logged(trainer)])
    assert rewards[0] == rewards[1]


def test_accumulation_and_micro_batches_change_nothing(make) -> None:
    """The same minibatch in one forward or in four: the same steps, to rounding."""
    runs = []
    for rows, accumulated in ((8, 1), (4, 2), (2, 4)):
        trainer = make(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            num_mini_batches=1,
            max_steps=3,
            optim="sgd",
            learning_rate=0.05,
            entropy_coef=0.01,
        )
        torch.manual_seed(11)
        trainer.train()
        runs.append(({n: p.detach() for n, p in trainer.model.named_parameters()}, logged(trainer)))
    (weights, logs), *others = runs
    for other_weights, other_logs in others:
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=0)
        for line, other in zip(logs, other_logs, strict=True):
            assert other["loss"] == pytest.approx(line["loss"], abs=1e-5)
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


def test_sharing_changes_nothing_but_the_work(make) -> None:
    runs = []
    for sharing in (True, False):
        trainer = make(prefix_sharing=sharing, num_generations=4, optim="sgd", learning_rate=0.05)
        torch.manual_seed(11)
        trainer.train()
        runs.append(trainer)
    shared, separate = runs
    for name, weight in separate.model.named_parameters():
        torch.testing.assert_close(
            dict(shared.model.named_parameters())[name], weight, atol=1e-5, rtol=0
        )
    assert shared.engine.stats.unique_tokens < separate.engine.stats.unique_tokens


def test_new_adapter(make) -> None:
    """Only adapter and value head learn; dropout does not disturb the ratio."""

    def parity(completion_ids, **_: Any) -> list[float]:
        return [float(sum(ids) % 2) for ids in completion_ids]

    options = {"peft_config": LORA}
    trainer = make(parity, options=options, num_ppo_epochs=1, gradient_checkpointing=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("value_head" in name for name in moved)
    assert any("lora_" in name for name in moved)
    assert all("lora_" in name or "value_head" in name for name in moved)
    assert trainer.ref_model is None
    assert trainer.first_step.startswith("old and new policy agree")
    assert logged(trainer)[0]["kl"] == pytest.approx(0, abs=1e-6) != logged(trainer)[1]["kl"]


def test_evaluation_samples_and_reports_rewards(make, data) -> None:
    trainer = make(options={"eval_dataset": data}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    (first, _) = [line for line in trainer.state.log_history if "eval_reward" in line]
    assert 1 <= first["eval_reward"] == first["eval_rewards/length/mean"] <= 6
    assert trainer.evaluate()["eval_completions/mean_length"] >= 1


def test_bf16_autocast_keeps_values_in_fp32(make) -> None:
    trainer = make(bf16=True, rollout_dtype="bfloat16", num_ppo_epochs=1)
    trainer.train()
    assert trainer.critic.module.weight.dtype == torch.float32
    assert 0 <= logged(trainer)[0]["rollout/kl"] < 0.1
    assert trainer.first_step.startswith("old and new policy agree")
    assert logged(trainer)[0]["kl"] == pytest.approx(0, abs=1e-2)


def test_a_forward_that_is_not_the_same_twice_is_told(make) -> None:
    trainer = make(max_steps=1)
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))
    with pytest.warns(FastpostWarning, match="ratio should be 1"):
        trainer.train()
    assert trainer.first_step.startswith("old and new policy differ")


def test_completions_without_an_opinion_are_not_learnt_from(make) -> None:
    def silent(prompts, **_) -> list[float | None]:
        return [None] * len(prompts)

    trainer = make(silent, max_steps=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.warns(FastpostWarning, match="no reward function had an opinion on 4 of 4"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_missing_eos_penalty(make) -> None:
    """An untrained model hardly ever ends within six tokens."""
    trainer = make(missing_eos_penalty=2.5, max_steps=1)
    trainer.train()
    (line,) = logged(trainer)
    ended = line["completions/ended"]
    assert line["reward"] == pytest.approx(line["rewards/length/mean"] - 2.5 * (1 - ended))
    assert ended < 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_generations": 3}, "does not divide the 4 completions"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"kl_coef": 0.0, "kl_target": 1.0}, "start from kl_coef > 0"),
        ({"kl_horizon": 10}, "would be ignored"),
        ({"train_sampling_strategy": "sequential"}, "is not read by"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"cliprange": 1.5}, "cliprange must be <= 1"),
        ({"cliprange_value": 0.0}, "cliprange_value must be > 0"),
        ({"lam": 1.1}, "lam must be between 0 and 1"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be >= 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"memory_budget_gb": 0.0}, "memory_budget_gb must be positive"),
        ({"rollout_dtype": "int8"}, "rollout_dtype must be"),
        ({"reward_weights": [1.0, 2.0]}, "2 numbers for 1 reward_funcs"),
    ],
)
def test_refused_settings(config, message, make) -> None:
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_refused_data_models_and_rewards(make, model, tokenizer, data) -> None:
    with pytest.raises(ValueError, match="one rollout takes 16"):
        make(gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="rename 'prompts' to 'prompt'"):
        make(train_dataset=data.rename_column("prompt", "prompts"))
    with pytest.raises(TypeError, match="must have a length"):
        make(train_dataset=data.to_iterable_dataset())
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        make([])
    with pytest.raises(TypeError, match="got int"):
        make(3)
    with pytest.raises(ValueError, match="num_labels=1"):
        make(reward_model(len(tokenizer), num_labels=2))
    with pytest.raises(ValueError, match="value_model must be"):
        make(options={"value_model": reward_model(len(tokenizer), num_labels=2)})
    with pytest.raises(ValueError, match="same object"):
        make(policy=model, options={"ref_model": model})
    with pytest.raises(TypeError, match="causal language model"):
        make(policy=reward_model(len(tokenizer)))
    with pytest.raises(ValueError, match="returned 1 rewards for 4 completions"):
        make(lambda **_: [0.0]).train()
    shared = reward_model(
        len(tokenizer), hidden_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    shared.model.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shares 'model\.embed_tokens\.weight' with the policy"):
        make(policy=model, options={"value_model": shared})


def test_plain_training_arguments_are_taken(model, tokenizer, data, tmp_path) -> None:
    trainer = fastpost.PPOTrainer(
        copy.deepcopy(model),
        length,
        TrainingArguments(str(tmp_path), remove_unused_columns=False, use_cpu=True, report_to=[]),
        data,
        processing_class=tokenizer,
    )
    assert isinstance(trainer.args, fastpost.PPOConfig) and trainer.args.num_ppo_epochs == 4
