"""Direct preference optimisation (Rafailov 2023, eq. 7).

    loss = −log σ(β [(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))])

A drop-in for `trl.DPOTrainer`: same constructor, same configuration fields (every `loss_type`),
same metrics, same parameters after the same steps. Beneath it the two answers of a pair share
their prompt, padding is never computed, only answer tokens reach the head, and the log-probs of
policy and reference come from one call of the kernel (`fastpost.preference_scoring`). Data, one
row:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}]}

The reference (`reference=...`) is a frozen copy of the policy, the policy with its adapter off, or
log-probs computed beforehand and kept on disk; what is used is logged at start. Refused: a
reference that is the policy or shares its weights, and DeepSpeed. Checked: the first step, where
reference and policy agree, must give log 2; the reference's weights must be the same at the end as
at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
import trl
from datasets import Dataset
from torch import Tensor
from trl.trainer import dpo_trainer as trl_dpo

from fastpost.adapters.preset import preset_argument
from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.reference import refuse_shared_reference
from fastpost.head import is_plain_head
from fastpost.preference_scoring import KeptRows, PairScorer
from fastpost.reference_cache import ScoredRow, unpadded_row
from fastpost.references import (
    ReferenceConfig,
    check_reference,
    drop_reference_adapter,
    frozen_reference,
    has_adapter,
)
from fastpost.scoring import Engine, FastpostWarning
from fastpost.trainers.cached_reference import (
    CachedReference,
    collated,
    content_digest_at_seam,
    with_columns,
)
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer, logger
from fastpost.trainers.reference_guard import ReferenceGuard
from fastpost.trainers.seam import engine_at_seam

# Rewards of the first step above which reference and policy do not agree.
_FIRST_STEP_TOLERANCE = 1e-3


@dataclass
class DPOConfig(EngineConfig, ReferenceConfig, trl.DPOConfig):
    """`trl.DPOConfig`, the engine's fields and `reference`. `padding_free` is always so here."""


class DPOTrainer(CachedReference, ReferenceGuard, EngineTrainer, trl.DPOTrainer):
    """`trl.DPOTrainer` on the packed, prefix-shared, logit-free forward.

    Overrides `_precompute_ref_logps`: log-probs computed beforehand come from the cache on disk.
    Overrides `_compute_loss`: the reference runs before the policy, and reaches TRL's loss as sums
    in the batch, which is where TRL looks for sums that were computed beforehand.

    Attributes:
        first_step: what the first step said about policy and reference, None before it.

    Raises:
        ValueError: the reference shares weights with the policy, or is not what `reference` asks
            for; the data set lacks columns or is empty.
    """

    precompute_ref_logps: bool

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
        kwargs |= preset_argument(args, kwargs)
        adapter = has_adapter(model, kwargs.get("peft_config"))
        check_reference(args, "DPO", ("base", "frozen", "cached"), adapter, ref_model)
        refuse_unsupported(args)
        args.padding_free = False  # what TRL has disabled under this name is what the engine does
        refuse_shared_reference(model, ref_model)
        if train_dataset is not None:
            require_rows(train_dataset, "train_dataset")
            require_columns(column_names(train_dataset), [["chosen", "rejected"]], "DPO")
        self._starts_at_reference = ref_model is None
        ref_model = frozen_reference(args, model, ref_model, adapter)
        self.first_step: str | None = None
        with engine_at_seam(trl_dpo, args) as engines, content_digest_at_seam(trl_dpo):
            super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        if self.precompute_ref_logps:
            self._free_reference(engines)
        if drop_reference_adapter(args, self.model):
            self._starts_at_reference = False
        self._take_engines(engines)
        self._guard_reference()

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        rows: list[ScoredRow] = []
        for pair in collated(dataset, self.data_collator):
            rows += _pair_rows(pair, self.ld_alpha)
        logps = self._cached_reference_logps(rows, 2 * batch_size, name)
        return with_columns(
            dataset, {"ref_chosen_logps": logps[0::2], "ref_rejected_logps": logps[1::2]}
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        assert isinstance(self.engine, Engine)
        pairs = PairScorer(self.engine.head, self._reference_of(inputs), self.ld_alpha)
        batch = dict(inputs)

        def score(*args: Any) -> Any:
            found = pairs(*args)
            sums = pairs.scores.ref_logps.chunk(2)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = sums
            return found

        with self.engine.scored_by(score), self._reference_in_batch():
            result = super()._compute_loss(model, batch, return_outputs)
        if self.first_step is None and self.model.training:
            loss = result[0] if return_outputs else result
            self.first_step = self._check_first_step(loss, pairs.scores.logratios)
            logger.warning("DPO first step: %s", self.first_step)
        return result

    def _reference_of(self, inputs: dict[str, Any]) -> Any:
        """The reference's side of a batch `[2P, T]`: sums `[2P]`, or rows for the policy's head."""
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        assert isinstance(self.engine, Engine)
        kept = KeptRows(self.engine.head)
        # Under FSDP a head is whole only within its own forward.
        waits = (
            self.ref_model is None and not self.is_fsdp_enabled and is_plain_head(self.engine.model)
        )
        with self.engine.scored_by(kept) if waits else nullcontext():
            sums = self.compute_ref_log_probs(
                self.model if self.ref_model is None else self.ref_model, inputs
            )
        return kept.rows if waits else torch.cat(sums)

    @contextmanager
    def _reference_in_batch(self) -> Iterator[None]:
        """TRL's loss reads the reference's sums from the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    def _check_first_step(self, loss: Tensor, logratios: Tensor) -> str:
        """Before any update, a reference equal to the policy gives zero rewards: loss = log 2."""
        if self.state.global_step > 0:
            return "resumed, reference and policy have parted already"
        rewards = [self.beta * side.mean().item() for side in logratios.chunk(2)]
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


def _pair_rows(pair: dict[str, Tensor], ld_alpha: float | None) -> list[ScoredRow]:
    """Chosen and rejected row of a collated pair `[2, T]`, as LD-DPO weighs their tokens."""
    mask = pair["completion_mask"]
    weights = mask.float()
    if ld_alpha is not None:
        position = mask[:, 1:].cumsum(1)  # of a token in its answer, from 1
        shared_length = position[:, -1].min()
        weights[:, 1:] *= torch.where(position > shared_length, ld_alpha, 1.0)
    return [
        unpadded_row(pair["input_ids"][i], pair["attention_mask"][i], weights[i]) for i in range(2)
    ]


__all__ = ["DPOConfig", "DPOTrainer"]
