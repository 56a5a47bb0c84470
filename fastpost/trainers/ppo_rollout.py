"""PPO's rollouts: from a batch of prompts to the rows that several epochs learn from.

    sample ─► rewards ─► old log-probs and values ─► reference ─► KL, GAE, whitening ─► minibatches

All forwards here are without gradient and in evaluation mode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from warnings import warn

import torch
from accelerate.utils import set_seed
from torch import Tensor
from trl.models import unwrap_model_for_generation

from fastpost.losses import kl_k1
from fastpost.losses.sequence import scored, seq_sum, token_mean
from fastpost.ppo import policy as policies
from fastpost.ppo.completions import Batch, TokenScores, lay_out, token_scores_in_chunks
from fastpost.ppo.critic import Critic
from fastpost.ppo.experience import NUM_TOKENS, MinibatchOrder, experience, explained_variance
from fastpost.ppo.kl_control import KLController
from fastpost.ppo.reward_scores import RewardScores
from fastpost.ppo.samples import Samples, end_token_ids, sample, whole_distribution
from fastpost.rollout.interface import Rollout
from fastpost.rollout.mismatch import MismatchMeter
from fastpost.rollout.transformers_rollout import TransformersRollout
from fastpost.scoring import FastpostWarning
from fastpost.trainers.engine_trainer import logger
from fastpost.trainers.ppo_config import PPOConfig

# Mean |log ratio| of two equal policies: rounding of two packings, in fp32 and in 16 bits.
_EQUAL_POLICIES, _EQUAL_POLICIES_HALF = 1e-3, 5e-2


class PPORollouts:
    """Mixed in before the `transformers.Trainer` of PPO.

    Attributes:
        rollout: samples the completions.
        kl_controller: holds the weight of the KL.
        first_step: what the first step said about old and new policy, None before it.
    """

    args: PPOConfig
    accelerator: Any
    model: Any
    model_wrapped: Any
    ref_model: Any
    processing_class: Any
    critic: Critic
    state: Any
    _rewards: RewardScores
    _value_model: Any
    _starts_at_reference: bool

    rollout: Rollout
    kl_controller: KLController
    first_step: str | None

    def _prepare_rollouts(self, base: Any) -> None:
        """Everything between prompts and minibatches."""
        args = self.args
        set_seed(args.seed, device_specific=True)  # ranks sample different completions
        self._eos_token_ids = end_token_ids(base, self.processing_class)
        self._mismatch = MismatchMeter(args.rollout_mismatch_limit)
        self.rollout = TransformersRollout(
            self._lend_policy,
            whole_distribution(
                temperature=args.temperature,
                max_new_tokens=args.max_completion_length,
                pad_token_id=self.processing_class.pad_token_id,
                eos_token_id=self._eos_token_ids,
            ),
            rollout_dtype=args.rollout_dtype,
            needs_logps=not (args.rollout_dtype is None and args.rollout_mismatch_limit is None),
        )
        self._minibatches = MinibatchOrder(
            args.rows_per_rollout,
            args.num_generations,
            args.num_ppo_epochs,
            args.num_mini_batches,
            args.gradient_accumulation_steps,
            seed=args.seed * 65_537 + args.process_index,
        )
        self.kl_controller = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.first_step = None
        # Held between steps, and therefore in checkpoints (`engine_trainer`).
        self._step = 0
        self._buffered_inputs: Batch | None = None
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}

    @contextmanager
    def _lend_policy(self) -> Iterator[Any]:
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as policy:
            yield policy

    def _roll_out(self, rows: list[dict[str, Any]]) -> Batch:
        """Sample, score and estimate: what `num_ppo_epochs` passes learn from."""
        args, num_generations = self.args, self.args.num_generations
        samples, batch, scores = self._sample_and_score(rows, num_generations, "train")
        old = self._scores_of(self.model, batch, self._value_model)
        mask = batch["response_mask"]
        kl = torch.zeros_like(old.logps)
        if args.kl_coef > 0:
            kl = scored(kl_k1(old.logps, self._reference_scores(batch).logps), mask)
        self._measure_mismatch(samples, batch, old)
        learn = partial(
            experience,
            self.accelerator,
            batch,
            old.logps,
            scores=scores,
            kl=kl,
            kl_coef=self.kl_controller.coefficient,
            gamma=args.gamma,
            whiten_rewards=args.whiten_rewards,
        )
        values: Tensor = old.values  # type: ignore[assignment]
        if self.state.global_step == 0 and self._step == 0:
            # λ = 1: returns that do not depend on the values
            returns = learn(old_values=values, lam=1.0)["returns"]
            values = values + scored(self._start_critic(returns, mask), mask)
        stored = learn(old_values=values, lam=args.lam)
        rollout = self._step // self._minibatches.forwards
        stored[NUM_TOKENS] = self._minibatches.count_tokens(self.accelerator, rollout, mask)
        found = {
            "kl": token_mean(kl, mask),
            "kl_per_completion": seq_sum(kl, mask).mean(),
            "explained_variance": explained_variance(stored["returns"], stored["old_values"], mask),
        }
        if args.kl_coef > 0:
            self._metrics["train"]["kl_coef"].append(self.kl_controller.coefficient)
        self._record("train", found)
        self._check_first_kl(kl, mask)
        # `_record` has just averaged it over ranks, so that all of them steer alike
        measured = self._metrics["train"]["kl_per_completion"][-1]
        self.kl_controller.update(measured, mask.shape[0] * self.accelerator.num_processes)
        self.model.train()
        return stored

    def _start_critic(self, returns: Tensor, mask: Tensor) -> Tensor:
        """`[B, C]`: by how much values rise, as the critic starts at the mean over all ranks."""
        sums = torch.stack([scored(returns, mask).sum(), mask.sum().to(returns.dtype)])
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return torch.full_like(returns, self.critic.start_at(total / max(count, 1)))

    def _sample_and_score(
        self, rows: list[dict[str, Any]], num_generations: int, mode: str
    ) -> tuple[Samples, Batch, Tensor]:
        """Completions of the rows' prompts, as tensors, and their scores `[B]`."""
        self.model.eval()
        samples = sample(
            self.rollout, rows, self.processing_class, num_generations, self._eos_token_ids
        )
        device = self.accelerator.device
        batch = lay_out(
            samples.prompt_ids, samples.completion_ids, self.processing_class.pad_token_id, device
        )
        scores, rewards = (tensor.to(device) for tensor in self._rewards(samples))
        has_ended = torch.tensor(samples.has_ended, device=device)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~has_ended
        has_score = ~scores.isnan()
        if not bool(has_score.all()):
            warn(
                f"fastpost: no reward function had an opinion on {int((~has_score).sum())} of "
                f"{len(scores)} completions; these are not learnt from",
                FastpostWarning,
                stacklevel=2,
            )
            batch["response_mask"] &= has_score[:, None]
        lengths = torch.tensor([float(len(ids)) for ids in samples.completion_ids], device=device)
        mean = scores.nanmean()
        found = {"reward": mean, "reward_std": (scores - mean).square().nanmean().sqrt()}
        for name, of_function in zip(self._rewards.names, rewards.unbind(1), strict=True):
            found[f"rewards/{name}/mean"] = of_function.nanmean()
        found["completions/mean_length"] = lengths.mean()
        found["completions/ended"] = has_ended.float().mean()
        self._record(mode, found)
        return samples, batch, scores.nan_to_num(nan=0.0)

    def _scores_of(self, model: Any, batch: Batch, value_model: Any = None) -> TokenScores:
        rows = self.args.per_device_train_batch_size
        return token_scores_in_chunks(model, batch, rows, value_model)

    def _reference_scores(self, batch: Batch) -> TokenScores:
        if self.ref_model is not None:
            # under the same autocast as the policy, so that equal weights give equal log-probs
            with self.accelerator.autocast():
                return self._scores_of(self.ref_model, batch)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._scores_of(self.model, batch)

    def _measure_mismatch(self, samples: Samples, batch: Batch, old: TokenScores) -> None:
        if samples.sampling_logps is None:
            return
        mask = batch["response_mask"]
        sampling = torch.full_like(old.logps, torch.nan)
        for row, logps in zip(sampling, samples.sampling_logps, strict=True):
            row[: len(logps)] = torch.tensor(logps, device=row.device)
        found = self._mismatch.metrics(sampling, old.logps, mask, self.accelerator.gather)
        for name, value in found.items():
            self._metrics["train"][name].append(value)

    def _check_first_ratio(self, log_ratio: Tensor, mask: Tensor) -> None:
        """Before any update the policy is the one that was scored."""
        if self.state.global_step > 0:
            self.first_step = "resumed, old and new policy have parted already"
            return
        found = token_mean(log_ratio.abs(), mask).item()
        self.first_step = f"old and new policy agree: mean |log ratio| {found:.1e}"
        if not found <= self._tolerance():
            self.first_step = f"old and new policy differ: mean |log ratio| {found:.1e}"
            self._warn_first(f"the first ratio should be 1, but mean |log ratio| is {found:.2g}")
        logger.warning("PPO first step: %s", self.first_step)

    def _check_first_kl(self, kl: Tensor, mask: Tensor) -> None:
        if self.state.global_step == 0 and self._starts_at_reference and self._step == 0:
            found = token_mean(kl.abs(), mask).item()
            if not found <= self._tolerance():
                self._warn_first(
                    f"policy and reference should be equal, but mean |log π − log π_ref| is "
                    f"{found:.2g}; an adapter that was trained before does this too"
                )

    def _tolerance(self) -> float:
        is_half = self.args.bf16 or self.args.fp16 or self._dtype.itemsize < 4
        return _EQUAL_POLICIES_HALF if is_half else _EQUAL_POLICIES

    @property
    def _dtype(self) -> torch.dtype:
        return policies.base_model(self.accelerator.unwrap_model(self.model)).dtype

    def _warn_first(self, found: str) -> None:
        warn(
            f"fastpost: at the first step {found}. A forward that is not the same twice (dropout, "
            "noise, routing) does this",
            FastpostWarning,
            stacklevel=2,
        )

    def _record(self, mode: str, found: dict[str, Tensor]) -> None:
        """Keep figures, averaged over ranks, until they are logged."""
        values = torch.stack([value.float() for value in found.values()])
        for name, value in zip(
            found, self.accelerator.reduce(values, "mean").tolist(), strict=True
        ):
            self._metrics[mode][name].append(value)


__all__ = ["PPORollouts"]
