"""Proximal policy optimisation from rewards of whole completions (Schulman 2017, arXiv 1707.06347;
on language models Ziegler 2019, arXiv 1909.08593, and Ouyang 2022, arXiv 2203.02155).

    loss = −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + c_V ½ max((V − R)², (V_clip − R)²) − c_H H
    ρ_t = π(y_t) / π_old(y_t),    A, R = GAE(r, V_old),    r_t = −β log(π_old/π_ref) [+ score, last]

A mean over completion tokens. Completions are sampled for one batch of prompts at a time, scored by
reward functions and reward models, and learnt from for several epochs. Data, one row; columns
beside `prompt` are passed to the reward functions:

    {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}

Policy, old policy, reference and value head share what they can: the value head reads the policy's
hidden states in the forward that gives the log-probs, the reference is the policy with its adapter
off (without an adapter a frozen copy), and in every forward padding is not computed and prompts of
neighbouring completions are computed once.

Refused: FSDP and DeepSpeed, several devices in one process, streamed data sets, a reference or
value model that shares the policy's weights. Checked: the first ratio must be 1, the KL of an
untrained policy to its reference 0, the reference's weights the same at the end as at the
beginning. Dropout is switched off, and `<checkpoint>/value_head.safetensors` (or `value_model`)
holds the critic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from fastpost.adapters.preset import preset_argument
from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.reference import refuse_shared_reference
from fastpost.losses import kl_k2, mean_entropy, ppo_loss, value_loss
from fastpost.losses.sequence import scored, token_mean
from fastpost.pooling import accelerate_pooled
from fastpost.ppo import policy as policies
from fastpost.ppo.completions import Batch, TokenScores, token_scores
from fastpost.ppo.critic import Critic
from fastpost.ppo.prompt_order import PromptOrder
from fastpost.ppo.reward_scores import RewardFunction, RewardScores
from fastpost.references import check_reference, frozen_reference, has_adapter
from fastpost.scoring import accelerate_model
from fastpost.trainers.engine_config import as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer
from fastpost.trainers.ppo_config import PPOConfig, refuse_ppo_settings
from fastpost.trainers.ppo_rollout import PPORollouts
from fastpost.trainers.reference_guard import ReferenceGuard


class PPOTrainer(PPORollouts, ReferenceGuard, EngineTrainer, Trainer):
    """PPO on the packed, prefix-shared, logit-free forward.

    Args:
        model: the policy, a causal language model, plain or with a PEFT adapter, or a path. A value
            head beside a path's weights is loaded too.
        reward_funcs: one or several of: a function in TRL's convention, a sequence classifier of
            one label, a path to one (`fastpost.ppo.reward_scores`).
        args: a `PPOConfig`.
        train_dataset: rows with `prompt`, a string or messages.
        eval_dataset: the same; `evaluate` samples once per prompt and reports rewards.
        processing_class: the tokenizer; None takes the one in the model's folder.
        ref_model: the reference, or its path. None: the policy as it is now, or without adapter.
        value_model: a sequence or token classifier of one label that gives the values. None: a
            linear head on the policy's hidden states, which begins at the first rollout's mean
            return.
        peft_config: an adapter to put on the model.
        callbacks: of `transformers.Trainer`.
        optimizers: optimizer and scheduler of `transformers.Trainer`.

    Attributes:
        engine: the engine of the policy; `ref_engine` that of a second model.
        critic: the value head or model.
        rollout, kl_controller, first_step: see `PPORollouts`.

    Raises:
        TypeError: a model or reward function of another kind, or a data set without length.
        ValueError: settings that cannot be honoured, too few prompts, missing columns, a reference
            or value model that shares the policy's weights.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: Any = None,
        value_model: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = as_config(args, PPOConfig)
        preset = preset_argument(args, {"peft_config": peft_config})
        peft_config = preset.get("peft_config", peft_config)
        adapter = has_adapter(model, peft_config)
        check_reference(args, "PPO", ("base", "frozen", "none"), adapter, ref_model)
        refuse_unsupported(args)
        refuse_ppo_settings(args, train_dataset)
        require_rows(train_dataset, "train_dataset")
        require_columns(column_names(train_dataset), [["prompt"]], "PPO")
        refuse_shared_reference(model, ref_model)
        self._starts_at_reference = ref_model is None
        ref_model = frozen_reference(args, model, ref_model, adapter)
        init_kwargs = policies.init_arguments(args.model_init_kwargs)
        path = model if isinstance(model, str) else None
        model = policies.prepare_policy(
            model, peft_config, init_kwargs, checkpoints_gradients=args.gradient_checkpointing
        )
        processing_class = policies.prepare_tokenizer(processing_class, model)
        self.ref_model: Any = None
        if args.kl_coef > 0:
            self.ref_model = policies.prepare_reference(model, ref_model, init_kwargs)
        base = policies.base_model(model)
        self._install_engines(base, value_model, args)
        if path is not None and self.critic.is_saved_in(path):
            self.critic.load(path)
        if args.ddp_find_unused_parameters is None:
            # every trained parameter takes part in every loss, the critic's outside the wrapper
            args.ddp_find_unused_parameters = False
        self._rewards = RewardScores(
            reward_funcs,
            args.reward_weights,
            processing_class,
            prefix_sharing=args.prefix_sharing,
            rows=args.per_device_train_batch_size,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for frozen in (self.ref_model, *self._rewards.models):
            if frozen is not None:
                frozen.to(self.accelerator.device)
        self._prepare_rollouts(base)
        self._get_train_sampler()  # refuses a data set that is too small for one rollout
        self.reward_func_names = self._rewards.names  # a resumed run must have the same
        self._take_engines(self._engines)
        self._guard_reference()

    def _install_engines(self, base: Any, value_model: Any, args: PPOConfig) -> None:
        """The critic below the policy, and the forwards of policy, reference and value model."""
        self.critic = Critic(base, value_model)
        self._value_model = value_model
        outputs = ["log_probs", "entropy"]
        if value_model is None:
            outputs.append("state_values")
        else:
            policies.switch_off_dropout(value_model)
            accelerate_pooled(value_model, prefix_sharing=args.prefix_sharing)
        models = [(base, outputs)]
        if self.ref_model is not None:
            models.append((self.ref_model, ["log_probs"]))
        self._engines = [
            accelerate_model(
                model,
                prefix_sharing=args.prefix_sharing,
                memory_budget_gb=args.memory_budget_gb,
                temperature=args.temperature,
                outputs=tuple(names),
            )
            for model, names in models
        ]

    # The loader gives one rollout's prompts for every forward that learns from it.

    def get_train_dataloader(self) -> Any:
        """Batches of one rollout's prompts, as often in a row as the rollout is learnt from."""
        return self._get_dataloader(
            self.train_dataset,
            description="Training",
            batch_size=self.args.rows_per_rollout // self.args.num_generations,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        prompts = self.args.rows_per_rollout // self.args.num_generations
        return PromptOrder(
            len(self.train_dataset if train_dataset is None else train_dataset),
            prompts * self.accelerator.num_processes,
            repeats=self._minibatches.forwards,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            forwards_done=lambda: self.state.global_step * self.args.gradient_accumulation_steps,
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The rows of this forward; sample and score a rollout where the last one is used up."""
        if self._step % self._minibatches.forwards == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._roll_out(inputs)
        batch = self._minibatches.micro_batch(self._buffered_inputs, self._step)
        self._step += 1
        return batch

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of one micro-batch as its share of the minibatch's mean over tokens."""
        args, mask, num_items = self.args, inputs["response_mask"], inputs["num_items"]
        new = token_scores(model, inputs, self._value_model)
        policy = ppo_loss(
            new.logps,
            inputs["old_logps"],
            inputs["advantages"],
            mask,
            epsilon=args.cliprange,
            num_items=num_items,
        )
        value = value_loss(
            new.values,  # type: ignore[arg-type]
            inputs["old_values"],
            inputs["returns"],
            mask,
            epsilon=args.cliprange_value,
            num_items=num_items,
        )
        loss = policy.loss + args.vf_coef * value.loss
        if args.entropy_coef > 0:
            loss = loss - args.entropy_coef * mean_entropy(new.entropy, mask, num_items)  # type: ignore[arg-type]
        self._watch(inputs, new, policy, value)
        # gradients are averaged over ranks, and the count of tokens is that of all ranks
        loss = loss * self.accelerator.num_processes
        return (loss, new) if return_outputs else loss

    @torch.no_grad()
    def _watch(self, inputs: Batch, new: TokenScores, policy: Any, value: Any) -> None:
        mask = inputs["response_mask"]
        log_ratio = scored(new.logps, mask) - scored(inputs["old_logps"], mask)
        if self.first_step is None:
            self._check_first_ratio(log_ratio, mask)
        shares = {
            "clip_ratio/low": policy.is_low_clipped,
            "clip_ratio/high": policy.is_high_clipped,
            "clip_ratio/value": value.is_clipped,
        }
        found = {name: token_mean(marks.float(), mask) for name, marks in shares.items()}
        found["entropy"] = mean_entropy(new.entropy, mask)  # type: ignore[arg-type]
        found["approx_kl"] = token_mean(kl_k2(new.logps, inputs["old_logps"]), mask)
        found["ratio"] = token_mean(log_ratio.exp(), mask)
        share = inputs["num_items"] / mask.sum().clamp(min=1)
        found["loss/policy"], found["loss/value"] = policy.loss * share, value.loss * share
        self._record("train", found)

    # Evaluation, logging, checkpoints.

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Sample once per prompt and record the rewards; there is no loss."""
        self._sample_and_score(inputs, 1, "eval")
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what was recorded since the last time."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        for name, values in self._metrics[mode].items():
            logs[prefix + name] = sum(values) / len(values)
        super().log(logs, start_time)
        self._metrics[mode].clear()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with self.critic.taken_off():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.critic.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self.critic.taken_off():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self.critic.taken_off():
            super()._load_best_model()
        self.critic.load(self.state.best_model_checkpoint)

    def _checkpoint_state(self) -> dict[str, Any]:
        return super()._checkpoint_state() | {"kl_coef": self.kl_controller.coefficient}

    def _restore_state(self, state: dict[str, Any]) -> None:
        super()._restore_state(state)
        self.kl_controller.coefficient = state["kl_coef"]

    def _restore_from_checkpoint(self) -> None:
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        super()._restore_from_checkpoint()


__all__ = ["PPOConfig", "PPOTrainer"]
