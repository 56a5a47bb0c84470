"""PPOTrainer takes the steps of a PPO written here with loops: one row at a time, unpacked, from
logits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    TrainerCallback,
)

import fastpost
from fastpost.rollout.interface import Completions

EOS = 2


def prompts(count: int = 24) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i} and {i * i}, so:" + " hm" * (i % 3), "number": i} for i in range(count)]
    )


def reward(completion_ids, number, **_: Any) -> list[float]:
    return [
        0.3 * len(ids) - 0.02 * (sum(ids) % 50) + 0.1 * (n % 4)
        for ids, n in zip(completion_ids, number, strict=True)
    ]


class GivenCompletions:
    """A rollout of made-up completions that remembers what was asked."""

    def __init__(self, vocab: int) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.vocab = vocab
        self.rollouts: list[list[tuple[list[int], list[int]]]] = []

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        def draw(high: int, count: int) -> list[int]:
            return torch.randint(3, high, (count,), generator=self.generator).tolist()

        completions = []
        for _ in prompt_ids:
            (length,) = draw(9, 1)
            ids = draw(self.vocab, length)
            completions.append([*ids, EOS] if length % 2 else ids)
        self.rollouts.append(list(zip(prompt_ids, completions, strict=True)))
        return Completions(completions)


def make_trainer(model, tokenizer, folder, trace=None, **options: Any) -> Any:
    trainer_options = {
        name: options.pop(name) for name in ("value_model", "ref_model") if name in options
    }
    reward_func = options.pop("reward_func", reward)
    config = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "max_steps": 5,
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    } | options
    trainer = fastpost.PPOTrainer(
        copy.deepcopy(model),
        reward_func,
        fastpost.PPOConfig(str(folder), **config),
        prompts(),
        processing_class=tokenizer,
        callbacks=[trace] if trace else None,
        **copy.deepcopy(trainer_options),
    )
    trainer.rollout = GivenCompletions(len(tokenizer))
    return trainer


class PlainPPO:
    """PPO as a textbook has it."""

    def __init__(self, model: Any, args: Any, value_model: Any = None) -> None:
        self.model, self.args = copy.deepcopy(model), args
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        self.base = base
        self.value_model = copy.deepcopy(value_model)
        self.reference = copy.deepcopy(self.model)
        if hasattr(self.model, "peft_config"):
            self.reference = self.reference.unload()
        self.value_head = torch.nn.Linear(base.config.hidden_size, 1)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.beta = args.kl_coef
        self.has_started = False
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        critic = self.value_head if self.value_model is None else self.value_model
        self.critic = {n: p for n, p in critic.named_parameters() if p.requires_grad}
        self.policy = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.trained = [*self.policy.values(), *self.critic.values()]
        self.optimizer = torch.optim.SGD(self.trained, lr=args.learning_rate)
        if args.optim != "sgd":
            self.optimizer = torch.optim.AdamW(
                self.trained, lr=args.learning_rate, weight_decay=0.0
            )

    def log_softmax(self, model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        return (logits / self.args.temperature).log_softmax(-1)[len(prompt) - 1 : -1]

    def values(self, prompt: list[int], completion: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + completion])
        if self.value_model is None:
            hidden = self.base.model(input_ids=ids).last_hidden_state[0]
            values = self.value_head(hidden)[:, 0]
        else:
            hidden = self.value_model.model(input_ids=ids).last_hidden_state[0]
            values = self.value_model.score(hidden)[:, 0]
        return values[len(prompt) - 1 : -1]

    def prepare(self, rows: list[Any], scores: list[float]) -> list[dict[str, torch.Tensor]]:
        args, prepared, kls = self.args, [], []
        for (prompt, completion), score in zip(rows, scores, strict=True):
            picked = torch.arange(len(completion)), torch.tensor(completion)
            with torch.no_grad():
                logps = self.log_softmax(self.model, prompt, completion)[picked]
                reference = self.log_softmax(self.reference, prompt, completion)[picked]
                values = self.values(prompt, completion)
            rewards = (-self.beta * (logps - reference)).tolist()
            if args.missing_eos_penalty and completion[-1] != EOS:
                score -= args.missing_eos_penalty
            rewards[-1] += score
            kls.append(float((logps - reference).sum()))
            prepared.append({"logps": logps, "values": values, "rewards": torch.tensor(rewards)})
        if args.whiten_rewards:
            everything = torch.cat([row["rewards"] for row in prepared])
            for row in prepared:
                centred = row["rewards"] - everything.mean()
                row["rewards"] = centred / (everything.var() + 1e-8).sqrt() + everything.mean()
        if self.value_model is None and not self.has_started:
            returns = []
            for row in prepared:
                to_go = 0.0
                for reward_here in reversed(row["rewards"].tolist()):
                    to_go = reward_here + args.gamma * to_go
                    returns.append(to_go)
            torch.nn.init.constant_(self.value_head.bias, sum(returns) / len(returns))
            for row in prepared:
                row["values"] += self.value_head.bias.detach()
        self.has_started = True
        for row in prepared:
            row["advantages"] = torch.zeros_like(row["values"])
            next_value = next_advantage = 0.0
            for t in reversed(range(len(row["values"]))):
                delta = row["rewards"][t] + args.gamma * next_value - row["values"][t]
                next_advantage = delta + args.gamma * args.lam * next_advantage
                next_value = row["values"][t]
                row["advantages"][t] = next_advantage
            row["returns"] = row["advantages"] + row["values"]
        everything = torch.cat([row["advantages"] for row in prepared])
        for row in prepared:
            row["advantages"] = (row["advantages"] - everything.mean()) / everything.std()
        if args.kl_target is not None:
            error = sum(kls) / len(kls) / args.kl_target - 1
            self.beta *= 1 + max(-0.2, min(0.2, error)) * len(kls) / args.kl_horizon
        return prepared

    def row_loss(self, row: Any, old: dict[str, torch.Tensor]) -> torch.Tensor:
        args, (prompt, completion) = self.args, row
        log_probs = self.log_softmax(self.model, prompt, completion)
        values = self.values(prompt, completion)
        loss = torch.zeros(())
        for t, token in enumerate(completion):
            ratio = (log_probs[t, token] - old["logps"][t]).exp()
            clipped = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            advantage = old["advantages"][t]
            loss = loss - torch.minimum(ratio * advantage, clipped * advantage)
            near = torch.clamp(
                values[t],
                old["values"][t] - args.cliprange_value,
                old["values"][t] + args.cliprange_value,
            )
            target = old["returns"][t]
            worst = torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            loss = loss + args.vf_coef * 0.5 * worst
            loss = loss + args.entropy_coef * (log_probs[t].exp() * log_probs[t]).sum()
        return loss

    def step(self, rows: list[Any], old: list[dict[str, torch.Tensor]]) -> None:
        tokens = sum(len(completion) for _, completion in rows)
        self.optimizer.zero_grad()
        total = 0.0
        for row, of_row in zip(rows, old, strict=True):
            loss = self.row_loss(row, of_row) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        if not self.losses:
            named = self.policy | {f"critic.{n}": p for n, p in self.critic.items()}
            self.gradients = {n: p.grad.clone() for n, p in named.items()}
        self.losses.append(total)
        self.optimizer.step()

    def learn(self, rollouts: list[Any], scores: list[list[float]], minibatches: Any) -> None:
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        for number, rows in enumerate(rollouts):
            prepared = self.prepare(rows, scores[number])
            for epoch in range(args.num_ppo_epochs):
                order = minibatches.row_order(number, epoch).tolist()
                for first in range(0, len(rows), size):
                    if len(self.losses) == args.max_steps:
                        return
                    chosen = order[first : first + size]
                    self.step([rows[i] for i in chosen], [prepared[i] for i in chosen])


class FirstGradients(TrainerCallback):
    """Gradients of our first step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
            }


def plain_name(name: str) -> str:
    """Our name of a parameter as `PlainPPO` has it."""
    for critic in ("value_head.", "value_model."):
        if critic in name:
            return "critic." + name.split(critic, 1)[1]
    return name


def compare(trainer: Any, plain: PlainPPO, watch: Any) -> None:
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == len(plain.losses) == trainer.args.max_steps
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain.losses), atol=1e-5, rtol=0)
    ours = {plain_name(name): gradient for name, gradient in watch.gradients.items()}
    assert ours.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    weights = {plain_name(name): p for name, p in trainer.model.named_parameters()}
    for name, parameter in (
        plain.policy | {f"critic.{n}": p for n, p in plain.critic.items()}
    ).items():
        torch.testing.assert_close(weights[name], parameter, atol=1e-4, rtol=0, msg=name)


def run_both(model, tokenizer, folder, **options: Any) -> tuple[Any, PlainPPO, Any]:
    watch = FirstGradients()
    trainer = make_trainer(model, tokenizer, folder, watch, **options)
    trainer.train()
    seen = trainer.rollout.rollouts
    numbers = {tuple(tokenizer(row["prompt"])["input_ids"]): row["number"] for row in prompts()}
    scores = [
        reward([ids for _, ids in rows], [numbers[tuple(prompt)] for prompt, _ in rows])
        for rows in seen
    ]
    plain = PlainPPO(model, trainer.args, options.get("value_model"))
    plain.learn(seen, scores, trainer._minibatches)
    return trainer, plain, watch


@pytest.mark.parametrize("constant", [40.0, -40.0])
def test_a_constant_added_to_all_scores_changes_nothing(
    constant, model, tokenizer, tmp_path
) -> None:
    """Scores of a reward model mean something up to a constant; lengths must not follow it."""

    def shifted(**given: Any) -> list[float]:
        return [score + constant for score in reward(**given)]

    trained = []
    for function in (reward, shifted):
        trainer = make_trainer(model, tokenizer, tmp_path, max_steps=8, reward_func=function)
        trainer.train()
        trained.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    plain, other = trained
    for name, start in model.named_parameters():
        moved, apart = plain[name] - start, other[name] - plain[name]
        assert float(apart.norm()) < 0.01 * float(moved.norm()), name
    bias = float(other["value_head.bias"] - plain["value_head.bias"])
    assert bias == pytest.approx(constant, rel=1e-3)


CASES = {
    "plain": {},
    "all-terms": {
        "kl_coef": 0.2,
        "cliprange": 0.05,
        "cliprange_value": 0.02,
        "vf_coef": 0.7,
        "entropy_coef": 0.05,
        "gamma": 0.98,
        "missing_eos_penalty": 1.0,
    },
    "no-reference": {"kl_coef": 0.0},
    "adaptive-kl": {"kl_coef": 0.3, "kl_target": 0.1, "kl_horizon": 40},
    "whitened-rewards": {"whiten_rewards": True},
    "groups": {"num_generations": 2, "temperature": 0.7},
    "checkpointing": {"gradient_checkpointing": True},
    "no-accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_value_head_on_the_policy(options, model, tokenizer, tmp_path) -> None:
    trainer, plain, watch = run_both(model, tokenizer, tmp_path, **options)
    compare(trainer, plain, watch)
    assert trainer.kl_controller.coefficient == pytest.approx(plain.beta, rel=1e-4)
    assert trainer.first_step.startswith("old and new policy agree")
    assert trainer.engine.packed_forwards and not trainer.engine.fallbacks
    stats = trainer.engine.stats
    assert stats.scored_tokens < stats.unique_tokens < stats.padded_tokens
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert logs[0]["kl_per_completion" if options.get("kl_coef") else "kl"] == pytest.approx(
        0, abs=1e-5
    )
    # what the cases claim to exercise happens
    if "cliprange_value" in options:
        assert max(line["clip_ratio/value"] for line in logs) > 0
        assert max(line["clip_ratio/low"] + line["clip_ratio/high"] for line in logs) > 0
    if "kl_target" in options:
        assert trainer.kl_controller.coefficient != 0.3


def tiny_value_model(classifier: type, vocab: int) -> Any:
    torch.manual_seed(3)
    return classifier(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocab,
            num_labels=1,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )


@pytest.mark.parametrize(
    "classifier", [LlamaForSequenceClassification, LlamaForTokenClassification]
)
def test_separate_value_model(classifier, model, tokenizer, tmp_path) -> None:
    value_model = tiny_value_model(classifier, len(tokenizer))
    for module in value_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the classification head's; ours switches it off
    trainer, plain, watch = run_both(
        model, tokenizer, tmp_path, value_model=value_model, vf_coef=0.5, cliprange_value=0.05
    )
    compare(trainer, plain, watch)
    assert trainer.critic.module.__class__ is classifier


def test_adapter_switched_off_is_the_reference(model, tokenizer, tmp_path) -> None:
    """An adapter that is not zero: policy and reference differ from the start, which is said."""
    policy = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    options = {"kl_coef": 0.2, "cliprange_value": 0.05, "entropy_coef": 0.02}
    with pytest.warns(fastpost.scoring.FastpostWarning, match="policy and reference"):
        trainer, plain, watch = run_both(policy, tokenizer, tmp_path, **options)
    compare(trainer, plain, watch)
    assert trainer.ref_model is None and trainer.ref_engine is None
    assert trainer.state.log_history[0]["kl"] != 0
    frozen = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen and not any("value_head" in name for name in frozen)


def test_another_objective_would_be_noticed(model, tokenizer, tmp_path) -> None:
    trainer, _, watch = run_both(model, tokenizer, tmp_path, kl_coef=0.2)
    _, other, _ = run_both(model, tokenizer, tmp_path, kl_coef=0.25)
    assert math.isfinite(other.losses[-1])
    with pytest.raises(AssertionError):
        compare(trainer, other, watch)
