"""The reference model is another model than the policy, and it stays as it was.

A reference that shares weights with the policy moves with it: the log-ratio is zero for ever, the
loss stays at log 2 and nothing is learnt, without an error anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


def refuse_shared_reference(model: Any, ref_model: Any) -> None:
    """Refuse a reference that is the policy or shares memory with its trainable weights.

    Raises:
        ValueError: says what is shared and how to pass a separate reference.
    """
    if ref_model is None or not isinstance(model, nn.Module):
        return
    advice = "pass ref_model=None (a frozen copy is made), or load the reference separately"
    if ref_model is model:
        raise ValueError(f"ref_model is the same object as model; {advice}")
    if not isinstance(ref_model, nn.Module):
        return
    trained = {_address(p): name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in ref_model.named_parameters():
        address = _address(parameter)
        if address is not None and address in trained:
            raise ValueError(
                f"ref_model shares memory with model: its '{name}' is the policy's "
                f"'{trained[address]}'; {advice}"
            )


def _address(tensor: Tensor) -> int | None:
    """Where a tensor (of this rank's shard under FSDP2) lies, None if it holds nothing."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return None if local.is_meta or local.numel() == 0 else local.data_ptr()


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Exclusive-or and sum of the bits of every tensor (of this rank's shard under FSDP2).

    Two reductions, no copy: exclusive-or alone misses equal changes to an even number of equal
    values, such as a norm's ones.
    """
    hashes = {}
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local = local.detach()
        if local.is_meta or local.numel() == 0:
            continue
        bits = local.view(_BITS[local.element_size()])
        exclusive_or = int(torch.hash_tensor(bits).view(torch.int64))
        hashes[name] = exclusive_or, int(bits.sum(dtype=torch.int64))
    return hashes


class ReferenceUnchanged(TrainerCallback):
    """Fingerprints the reference when training begins and compares when it ends.

    Args:
        tensors: a function that gives the reference's named tensors; under PEFT these are the
            frozen weights of the policy itself.
    """

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors
        self._before: dict[str, tuple[int, int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = fingerprint(self._tensors())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = fingerprint(self._tensors())
        changed = [name for name, value in self._before.items() if after.get(name) != value]
        if changed:
            raise RuntimeError(
                f"the reference model changed during training ({len(changed)} tensors, first "
                f"'{changed[0]}'): the log-ratios of this run are wrong. Something wrote to its "
                "weights; pass a reference that nothing else trains or merges into"
            )


__all__ = ["ReferenceUnchanged", "fingerprint", "refuse_shared_reference"]
