"""The reference of a trainer that has one: which tensors it is made of, and that they stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastpost.guards.reference import ReferenceUnchanged


class ReferenceGuard:
    """Mixed in before a TRL trainer with `ref_model`, `sync_ref_model` and a precomputed reference.

    The reference is a second model, log-probs computed beforehand, or the policy without its
    adapter.
    """

    model: Any
    ref_model: Any
    args: Any
    precompute_ref_logps: bool
    add_callback: Any

    def _guard_reference(self) -> None:
        """Compare the reference's weights at the end of training with those at its beginning."""
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


__all__ = ["ReferenceGuard"]
