"""Trainers whose reference may be log-probs computed before training.

TRL computes them with the training collator batch by batch, keeps them in the data set's own cache
by its fingerprint, and keeps the reference model. Here they come from `fastpost.reference_cache`,
and the reference is freed before training.

A trainer says what its rows are (`_precompute_ref_logps`, from `collated` and
`_cached_reference_logps`), constructs itself within `content_digest_at_seam`, and calls
`_free_reference` afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import use_adapter

from fastpost.reference_cache import (
    CacheReport,
    ScoredRow,
    cache_folder,
    cached_logps,
    reference_digest,
)
from fastpost.references import has_adapter
from fastpost.scoring import IGNORE_INDEX


@contextmanager
def content_digest_at_seam(trl_module: ModuleType) -> Iterator[None]:
    """Name the reference by our digest wherever the module's trainer hashes it.

    TRL does that at the one moment when the reference is loaded and not yet sharded; its own hash
    contains the adapter, whose random beginning would be another reference on every run.
    """
    stock = trl_module.hash_module
    trl_module.hash_module = reference_digest  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trl_module.hash_module = stock  # type: ignore[attr-defined]


def collated(dataset: Any, collator: Any) -> Iterator[dict[str, Any]]:
    """Each row of a data set as the collator gives it for training, one at a time.

    Raises:
        ValueError: the data set is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "reference log-probs cannot be computed beforehand for a stream "
            f"({type(dataset).__name__}): pass a map-style data set, or choose reference='frozen' "
            "or 'base'"
        )
    for row in dataset:
        yield collator([row])


def with_columns(dataset: Dataset, columns: dict[str, Tensor]) -> Dataset:
    """A data set with fp32 columns added."""
    for name, values in columns.items():
        dataset = dataset.add_column(name, pa.array(values.numpy().astype(np.float32)))
    return dataset


class CachedReference:
    """Mixed in before a TRL trainer with `precompute_ref_logps`.

    Attributes:
        reference_report: which log-probs are used, None where there are none beforehand.
    """

    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    _tokenizer: Any
    _precompute_model_hash: str

    reference_report: CacheReport | None = None
    _is_reference_freed = False

    def _cached_reference_logps(
        self, rows: list[ScoredRow], batch_rows: int, dataset_name: str
    ) -> Tensor:
        """Weighted log-probs `[len(rows)]` of rows under the reference, from the cache."""
        values, report = cached_logps(
            rows,
            cache_folder(self._precompute_model_hash, str(self.accelerator.mixed_precision)),
            self._score_with_reference,
            batch_rows=batch_rows,
            accelerator=self.accelerator,
            description=None
            if self.args.disable_tqdm or not self.accelerator.is_main_process
            else f"Reference log-probs of {dataset_name} data",
        )
        if self.reference_report is None:  # the training data comes first
            self.reference_report = report
        return values

    def _score_with_reference(self, rows: list[ScoredRow]) -> Tensor:
        if self._is_reference_freed:
            raise ValueError(
                "these rows are not in the cache and the reference was freed before training; pass "
                "the data as eval_dataset when the trainer is made, or choose reference='frozen'"
            )
        model = self.model if self.ref_model is None else self.ref_model
        device = self.accelerator.device

        def padded(columns: list[np.ndarray], fill: float) -> Tensor:
            tensors = [torch.from_numpy(column) for column in columns]
            return pad_sequence(tensors, batch_first=True, padding_value=fill).to(device)

        ids = padded([row.ids for row in rows], self._tokenizer.pad_token_id)
        weights = padded([row.weights for row in rows], 0.0)
        attended = padded([np.ones_like(row.ids) for row in rows], 0)
        with (
            torch.no_grad(),
            _in_evaluation(model),
            self._reference_adapter(),
            self.accelerator.autocast(),
        ):
            log_probs = model(
                input_ids=ids,
                attention_mask=attended,
                use_cache=False,
                labels=ids.masked_fill(weights == 0, IGNORE_INDEX),
                fused_lm_head=True,
            ).log_probs
        # An adapter may put tokens of its own in front.
        return (log_probs[:, -(ids.shape[1] - 1) :] * weights[:, 1:]).sum(1)

    def _reference_adapter(self) -> Any:
        """The policy as its own reference: its adapter off, or TRL's frozen copy of it on."""
        if self.ref_model is not None or not has_adapter(self.model):
            return nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        return use_adapter(policy, "ref" if "ref" in policy.peft_config else None)

    def _free_reference(self, engines: list[Any]) -> None:
        """Let go of the reference model and its engine, the second of `engines`.

        Whoever passed the model may still hold it.
        """
        self.ref_model = None  # TRL may have done that already
        self._is_reference_freed = len(engines) > 1
        for engine in engines[1:]:
            engine.remove()
        del engines[1:]
        policy = self.accelerator.unwrap_model(self.model)
        self.accelerator._models = [
            model
            for model in self.accelerator._models
            if self.accelerator.unwrap_model(model) is policy
        ]


@contextmanager
def _in_evaluation(model: Any) -> Iterator[None]:
    """The model in eval mode, every module's own mode restored after."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training:
            module.training = training


__all__ = ["CachedReference", "collated", "content_digest_at_seam", "with_columns"]
