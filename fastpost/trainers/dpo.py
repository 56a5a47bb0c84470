"""Direct preference optimisation (Rafailov 2023, eq. 7).

    loss = −log σ(β [(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))])

A drop-in for `trl.DPOTrainer`: same constructor, same configuration fields (every `loss_type`),
same metrics, same parameters after the same steps. Beneath it the two answers of a pair share
their prompt, padding is never computed, and only answer tokens reach the head. Data, one row:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}]}

The reference is a frozen copy of the policy, the policy with its adapter off, or log-probs computed
beforehand. Refused: a reference that is the policy or shares its weights, and DeepSpeed. Checked:
the first step, where reference and policy agree, must give log 2; the reference's weights must be
the same at the end as at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from warnings import warn

import trl
from torch import Tensor
from trl.trainer import dpo_trainer as trl_dpo

from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.reference import ReferenceUnchanged, refuse_shared_reference
from fastpost.scoring import FastpostWarning
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer, logger
from fastpost.trainers.seam import engine_at_seam

# Rewards of the first step above which reference and policy do not agree.
_FIRST_STEP_TOLERANCE = 1e-3


@dataclass
class DPOConfig(EngineConfig, trl.DPOConfig):
    """`trl.DPOConfig` and the fields of the engine. `padding_free` is always so here."""


class DPOTrainer(EngineTrainer, trl.DPOTrainer):
    """`trl.DPOTrainer` on the packed, prefix-shared, logit-free forward.

    Attributes:
        first_step: what the first step said about policy and reference, None before it.

    Raises:
        ValueError: the reference shares weights with the policy, the data set lacks columns or is
            empty.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | trl.DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, DPOConfig)
        refuse_unsupported(args)
        args.padding_free = False  # what TRL has disabled under this name is what the engine does
        refuse_shared_reference(model, ref_model)
        if train_dataset is not None:
            require_rows(train_dataset, "train_dataset")
            require_columns(column_names(train_dataset), [["chosen", "rejected"]], "DPO")
        self.first_step: str | None = None
        with engine_at_seam(trl_dpo, args) as engines:
            super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        self._take_engines(engines)
        self._starts_at_reference = ref_model is None
        self.add_callback(ReferenceUnchanged(self._reference_tensors))

    def _reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights that make up the reference: its own, or the policy's frozen ones."""
        if self.ref_model is not None:
            if not self.args.sync_ref_model:
                yield from self.ref_model.named_parameters()
            return
        if self.precompute_ref_logps:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.first_step is None and self.model.training:
            self.first_step = self._check_first_step(result[0] if return_outputs else result)
            logger.warning("DPO first step: %s", self.first_step)
        return result

    def _check_first_step(self, loss: Tensor) -> str:
        """Before any update, a reference equal to the policy gives zero rewards: loss = log 2."""
        if self.state.global_step > 0:
            return "resumed, reference and policy have parted already"
        metrics = self._metrics["train"]
        rewards = [metrics[f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
        largest = max(abs(reward) for reward in rewards)
        found = f"mean rewards {rewards[0]:.2e} and {rewards[1]:.2e}, loss {loss.item():.6f}"
        if largest <= _FIRST_STEP_TOLERANCE:
            if (
                self.loss_types == ["sigmoid"]
                and not self.use_weighting
                and not self.label_smoothing
            ):
                found += f" (log 2 = {math.log(2):.6f})"
            return f"policy equals reference: {found}"
        if self._starts_at_reference:
            warn(
                f"fastpost: the first step should find policy and reference equal, but {found}. "
                "Dropout that is still on, or a reference loaded from other weights, does this",
                FastpostWarning,
                stacklevel=2,
            )
        return f"policy differs from reference: {found}"


__all__ = ["DPOConfig", "DPOTrainer"]
