"""Kahneman-Tversky optimisation on labelled answers (Ethayarajh 2024, arXiv 2402.01306, eq. 7).

    r = log π(y|x) − log π_ref(y|x),   z₀ = max(0, mean over the batch of r for mismatched y', x)
    label true    loss = λ_D (1 − σ(β (r − z₀)))
    label false   loss = λ_U (1 − σ(β (z₀ − r)))

A drop-in for `trl.KTOTrainer`: same constructor, same configuration fields (both `loss_type`s),
same metrics, same parameters after the same steps. z₀ is estimated on each prompt with the answer
of its neighbour in the batch. Policy and reference score each kind of row in the same forward, so
that before the first update they agree to the last bit, also in 16 bits. Data, one row:

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

from dataclasses import dataclass
from typing import Any

import trl
from datasets import Dataset
from trl.trainer import kto_trainer as trl_kto

from fastpost.adapters.preset import preset_argument
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


@dataclass
class KTOConfig(EngineConfig, ReferenceConfig, trl.KTOConfig):
    """`trl.KTOConfig`, the fields of the engine, and `reference`."""


class KTOTrainer(CachedReference, ReferenceGuard, EngineTrainer, trl.KTOTrainer):
    """`trl.KTOTrainer` on the packed, prefix-shared, logit-free forward.

    Overrides `_precompute_ref_logps`: log-probs computed beforehand come from the cache on disk.

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
        kwargs |= preset_argument(args, kwargs)
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


__all__ = ["KTOConfig", "KTOTrainer"]
