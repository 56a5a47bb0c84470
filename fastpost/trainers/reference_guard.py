"""The reference of a trainer that has one: which tensors it is made of, and that they stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastpost.guards.reference import ReferenceUnchanged
from fastpost.references import weighs_reference
from fastpost.sharding import reshard


class ReferenceGuard:
    """Mixed in before a trainer with `ref_model`.

    The reference is a second model, log-probs computed beforehand, the policy without its adapter,
    or none where its weight in the objective is 0.
    """

    model: Any
    ref_model: Any
    args: Any
    add_callback: Any

    def _guard_reference(self) -> None:
        """Compare the reference's weights at the end of training with those at its beginning."""
        self.add_callback(ReferenceUnchanged(self._reference_tensors))

    def _reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights that make up the reference: its own, or the policy's frozen ones."""
        if self.ref_model is not None:
            if not getattr(self.args, "sync_ref_model", False):
                reshard(self.ref_model)
                yield from self.ref_model.named_parameters()
            return
        if getattr(self, "precompute_ref_logps", False) or not weighs_reference(self.args):
            return
        reshard(self.model)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter


__all__ = ["ReferenceGuard"]
