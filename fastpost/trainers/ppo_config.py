"""The settings of proximal policy optimisation, and which of them cannot be honoured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from fastpost.references import ReferenceConfig
from fastpost.rollout.rollout_config import RolloutConfig
from fastpost.trainers.engine_config import EngineConfig

_KL_HORIZON = 10_000


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(EngineConfig, ReferenceConfig, RolloutConfig, TrainingArguments):
    """`transformers.TrainingArguments` and the fields of PPO, under the names TRL gave them.

    One rollout is `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches`
    completions per process. It is learnt from `num_ppo_epochs` times, `num_mini_batches` optimizer
    steps each: `max_steps` and the learning rate schedule count optimizer steps.

    Attributes:
        max_completion_length: longest completion in tokens.
        temperature: of sampling, and of all log-probs.
        num_generations: completions sampled per prompt.
        num_ppo_epochs: passes over one rollout.
        num_mini_batches: optimizer steps of one pass.
        kl_coef: weight β ≥ 0 of the KL to the reference inside the reward; 0 needs no reference.
        kl_target: KL per completion, in nats, that β is steered to; None keeps β.
        kl_horizon: completions over which a steered β changes by at most a fifth.
        gamma: discount per token.
        lam: λ of generalised advantage estimation.
        cliprange: half-width of the interval of ratios that teach.
        cliprange_value: how far a value may profitably move in one rollout.
        vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        whiten_rewards: give token rewards unit variance over the rollout.
        missing_eos_penalty: subtracted from the score of a completion that was cut off.
        reward_weights: one factor per reward function; None weighs all by 1.
        model_init_kwargs: for `from_pretrained`, where models are given as paths.
    """

    learning_rate: float = _field(3e-6, "Initial learning rate.")
    logging_steps: float = _field(10, "Optimizer steps between two log lines.")
    remove_unused_columns: bool | None = _field(
        False, "Always False: columns are passed to the reward functions."
    )
    max_completion_length: int = _field(256, "Longest completion in tokens.")
    temperature: float = _field(1.0, "Temperature of sampling and of log-probs.")
    num_generations: int = _field(1, "Completions sampled per prompt.")
    num_ppo_epochs: int = _field(4, "Passes over one rollout.")
    num_mini_batches: int = _field(1, "Optimizer steps of one pass over a rollout.")
    kl_coef: float = _field(0.05, "Weight of the KL to the reference. 0: no reference.")
    kl_target: float | None = _field(None, "KL per completion (nats) to steer kl_coef to.")
    kl_horizon: int = _field(_KL_HORIZON, "Completions over which kl_coef moves by a fifth.")
    gamma: float = _field(1.0, "Discount per token.")
    lam: float = _field(0.95, "Lambda of generalised advantage estimation.")
    cliprange: float = _field(0.2, "Half-width of the interval of ratios that teach.")
    cliprange_value: float = _field(0.2, "How far a value may profitably move.")
    vf_coef: float = _field(0.1, "Weight of the value loss.")
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus.")
    whiten_rewards: bool = _field(False, "Give token rewards unit variance.")
    missing_eos_penalty: float | None = _field(
        None, "Subtracted from the score of a completion that was cut off."
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One factor per reward function."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained, for models given as paths."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_ranges()
        rows = self.rows_per_rollout
        if rows % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} does not divide the {rows} completions of "
                "a rollout (per_device_train_batch_size * gradient_accumulation_steps * "
                "num_mini_batches); change one of them"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_target steers kl_coef by a factor, which leaves kl_coef=0 at 0; start from "
                "kl_coef > 0"
            )
        if self.kl_target is None and self.kl_horizon != _KL_HORIZON:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} would be ignored: kl_coef is only steered towards a "
                "kl_target. Set kl_target, or leave kl_horizon out"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size cannot be used with PPO, whose rollouts are cut into batches "
                "of a known size; set per_device_train_batch_size"
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} is not read by "
                "PPOTrainer, which draws prompts in a new order every epoch; leave it out"
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False: reward functions get the columns"
            )

    def _require_ranges(self) -> None:
        positive = ["temperature", "cliprange", "cliprange_value", "kl_horizon"]
        if self.kl_target is not None:
            positive.append("kl_target")
        at_least_one = (
            "max_completion_length",
            "num_generations",
            "num_ppo_epochs",
            "num_mini_batches",
        )
        for names, is_fit, expected in (
            (positive, lambda value: value > 0, "> 0"),
            (at_least_one, lambda value: value >= 1, ">= 1"),
            (("kl_coef", "vf_coef", "entropy_coef"), lambda value: value >= 0, ">= 0"),
            (("gamma", "lam"), lambda value: 0 <= value <= 1, "between 0 and 1"),
            (("cliprange",), lambda value: value <= 1, "<= 1"),
        ):
            for name in names:
                if not is_fit(getattr(self, name)):
                    raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def rows_per_rollout(self) -> int:
        """Completions of a rollout on one process."""
        return (
            self.per_device_train_batch_size
            * self.gradient_accumulation_steps
            * self.num_mini_batches
        )


def refuse_ppo_settings(args: PPOConfig, train_dataset: Any) -> None:
    """Refuse what depends on how and on what the run is started.

    Raises:
        TypeError: the data set has no length.
        ValueError: FSDP, or several devices in one process.
    """
    if not hasattr(train_dataset, "__len__"):
        raise TypeError(
            f"train_dataset must have a length, got {type(train_dataset).__name__}: rollouts are "
            "drawn in a new order every epoch. Load the prompts into a datasets.Dataset"
        )
    if args.fsdp:
        raise ValueError(
            "fsdp is not supported by PPOTrainer: rollout and value head need whole weights. Use "
            "data parallelism (torchrun without fsdp), or peft_config to save memory"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices are visible to one process, which would wrap the model in "
            "DataParallel. Start with torchrun or accelerate launch, or show one device"
        )


__all__ = ["PPOConfig", "refuse_ppo_settings"]
