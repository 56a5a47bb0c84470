"""Kahneman-Tversky optimisation on labelled answers (Ethayarajh 2024, arXiv 2402.01306, eq. 7).

    r = log π(y|x) − log π_ref(y|x),   z₀ = max(0, mean over the batch of r for mismatched y', x)
    label true    loss = λ_D (1 − σ(β (r − z₀)))
    label false   loss = λ_U (1 − σ(β (z₀ − r)))

A drop-in for `trl.KTOTrainer`: same constructor, same configuration fields (both `loss_type`s),
same metrics, same parameters after the same steps. z₀ is estimated on each prompt with the answer
of its neighbour in the batch. Those rows begin as the batch's own rows do, so the reference scores
both kinds in one forward in which every prompt is computed once; the policy scores them in a
forward of their own, because only its rows of the batch need gradients. Data, one row:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "completion": [{"role": "assistant", "content": "4"}],
     "label": True}

or paired data (`chosen`, `rejected`), from which TRL makes two rows each.

The reference (`reference=...`) is a frozen copy of the policy, the policy with its adapter off, or
log-probs computed beforehand and kept on disk; what is used is logged at start. Refused: a
reference that is the policy or shares its weights, and DeepSpeed. Checked: the reference's weights
must be the same at the end as at the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from trl.trainer import kto_trainer as trl_kto

from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.reference import refuse_shared_reference
from fastpost.reference_cache import unpadded_row
from fastpost.references import (
    ReferenceConfig,
    check_reference,
    drop_reference_adapter,
    frozen_reference,
    has_adapter,
)
from fastpost.trainers.cached_reference import (
    CachedReference,
    collated,
    content_digest_at_seam,
    with_columns,
)
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer
from fastpost.trainers.reference_guard import ReferenceGuard
from fastpost.trainers.seam import engine_at_seam

_ROW_FIELDS = ("input_ids", "attention_mask", "completion_mask")
# What a batch of text holds. With anything else (images, token types) TRL's own forwards run.
_TEXT_BATCH = frozenset({*_ROW_FIELDS, *(f"KL_{name}" for name in _ROW_FIELDS), "label"})


@dataclass
class KTOConfig(EngineConfig, ReferenceConfig, trl.KTOConfig):
    """`trl.KTOConfig`, the fields of the engine, and `reference`."""


class KTOTrainer(CachedReference, ReferenceGuard, EngineTrainer, trl.KTOTrainer):
    """`trl.KTOTrainer` on the packed, prefix-shared, logit-free forward.

    Overrides `compute_ref_log_probs` and `_compute_loss`, so that the reference takes one forward,
    and `_precompute_ref_logps`: log-probs computed beforehand come from the cache on disk.

    Raises:
        ValueError: the reference shares weights with the policy, or is not what `reference` asks
            for; the data set lacks columns or is empty.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: KTOConfig | trl.KTOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, KTOConfig)
        adapter = has_adapter(model, kwargs.get("peft_config"))
        check_reference(args, "KTO", ("base", "frozen", "cached"), adapter, ref_model)
        refuse_unsupported(args)
        refuse_shared_reference(model, ref_model)
        if train_dataset is not None:
            require_rows(train_dataset, "train_dataset")
            require_columns(
                column_names(train_dataset),
                [["prompt", "completion", "label"], ["chosen", "rejected"]],
                "KTO",
            )
        ref_model = frozen_reference(args, model, ref_model, adapter)
        with engine_at_seam(trl_kto, args) as engines, content_digest_at_seam(trl_kto):
            super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        if self.precompute_ref_logps:
            self._free_reference(engines)
        drop_reference_adapter(args, self.model)
        self._take_engines(engines)
        self._guard_reference()

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        kinds = {"": "ref_logps"} | ({"KL_": "ref_KL_logps"} if self.calculate_KL else {})
        rows = [
            unpadded_row(*(batch[f"{kind}{column}"][0] for column in _ROW_FIELDS))
            for batch in collated(dataset, self.data_collator)
            for kind in kinds
        ]
        logps = self._cached_reference_logps(rows, len(kinds) * batch_size, name)
        columns = {column: logps[i :: len(kinds)] for i, column in enumerate(kinds.values())}
        return with_columns(dataset, columns)

    def compute_ref_log_probs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs `[B]` of the batch's rows and of the mismatched rows, None without those."""
        if not self.calculate_KL:
            return super().compute_ref_log_probs(model, inputs)
        both = _stack_rows(inputs, self._tokenizer.pad_token_id)
        with _attribute(self, "calculate_KL", False):
            logps, _ = super().compute_ref_log_probs(model, both)
        matched, mismatched = logps.chunk(2)
        return matched, mismatched

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.precompute_ref_logps or not inputs.keys() <= _TEXT_BATCH:
            return super()._compute_loss(model, inputs, return_outputs)
        reference = self.model if self.ref_model is None else self.ref_model
        logps, mismatched_logps = self.compute_ref_log_probs(reference, inputs)
        inputs = {**inputs, "ref_logps": logps, "ref_KL_logps": mismatched_logps}
        # With this set TRL reads the reference from the batch, where it now stands.
        with _attribute(self, "precompute_ref_logps", True):
            return super()._compute_loss(model, inputs, return_outputs)


def _stack_rows(inputs: dict[str, Any], pad_token_id: int) -> dict[str, Tensor]:
    """Matched rows `[B, T]` on top of the mismatched ones `[B, T']`, as `[2B, max(T, T')]`."""
    width = max(inputs["input_ids"].shape[1], inputs["KL_input_ids"].shape[1])
    stacked = {}
    for name in _ROW_FIELDS:
        fill = pad_token_id if name == "input_ids" else 0
        kinds = (inputs[name], inputs[f"KL_{name}"])
        stacked[name] = torch.cat([F.pad(k, (0, width - k.shape[1]), value=fill) for k in kinds])
    return stacked


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name = value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


__all__ = ["KTOConfig", "KTOTrainer"]
