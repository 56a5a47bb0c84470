"""The kernels of the language-model head for a weight that is spread over processes.

A `DTensor` says on each dimension of its mesh how it is spread, and the dimension's name says what
the processes along it compute:

    "tp", Shard(0)       the same rows, each its part of the vocabulary: `vocab_parallel_logprob`.
                         Transformers' plans do so, "colwise_gather_output" on lm_head
    "tp", anything else  the same rows ("rowwise_split_input" is Shard(1)): the weight is gathered,
                         every rank computes the same and keeps its part of the gradient
    any other name       rows of their own (FSDP2, HSDP): the weight is gathered, the ranks'
    or none              gradients are averaged, as FSDP2 does inside its units

A tensor-parallel dimension under another name is gathered like the rest: right as well, since the
ranks' equal gradients are their own average, but without the saving. So is every head with a LoRA
adapter. A plain tensor goes to the plain kernel: FSDP2 gives one behind the backbone, where it has
gathered the head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fastpost_kernels import (
    LinearCrossEntropy,
    LinearLogprob,
    LoraHead,
    linear_cross_entropy,
    linear_logprob,
    vocab_parallel_logprob,
)

TENSOR_PARALLEL = "tp"


def parallel_linear_logprob(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M] int64
    bias: Tensor | None = None,  # [V]
    *,
    lora: LoraHead | None = None,
    **options: Any,
) -> LinearLogprob:
    """`fastpost_kernels.linear_logprob` of a head whose weight and bias may be DTensors.

    Args:
        hidden: this process's rows, a plain tensor; the same on all ranks of a "tp" dimension.
        weight, bias: plain, or DTensors of any placement but Partial; see above.
        targets: as for `linear_logprob`, in the whole vocabulary.
        lora: an adapter of plain tensors; the weight is then gathered.
        options: those of `linear_logprob`; over a vocabulary in parts, of `vocab_parallel_logprob`.

    Raises:
        TypeError: `hidden` is a DTensor.
        ValueError: a Partial weight, a bias spread unlike the weight, and what the kernels refuse.
    """
    head = _held(hidden, weight, bias, may_split=lora is None)
    if head.group is None:
        return linear_logprob(hidden, head.weight, targets, head.bias, lora=lora, **options)
    return _score_parts(hidden, head, targets, options)


def parallel_linear_cross_entropy(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M] int64
    bias: Tensor | None = None,  # [V]
    *,
    lora: LoraHead | None = None,
    num_items: Tensor | float | None = None,
    **options: Any,
) -> LinearCrossEntropy:
    """`fastpost_kernels.linear_cross_entropy` likewise: the sum over `num_items`, or the mean.

    Over a vocabulary in parts it is made of log-probs: label smoothing and z-loss are refused.
    """
    head = _held(hidden, weight, bias, may_split=lora is None)
    if head.group is None:
        return linear_cross_entropy(
            hidden, head.weight, targets, head.bias, lora=lora, num_items=num_items, **options
        )
    found = _score_parts(hidden, head, targets, options)
    count = (targets != -100).sum().clamp(min=1) if num_items is None else num_items
    return LinearCrossEntropy(
        -found.logprob.sum() / count,
        found.logprob.detach(),
        None if found.entropy is None else found.entropy.detach(),
        found.is_top1,
    )


class _Held(NamedTuple):
    """Plain tensors to compute with: the whole head, or from `start` on a part of its vocabulary,
    with the rest on the other ranks of `group`."""

    weight: Tensor
    bias: Tensor | None
    vocab: int
    group: ProcessGroup | None = None
    start: int = 0


def _score_parts(
    hidden: Tensor, head: _Held, targets: Tensor, options: dict[str, Any]
) -> LinearLogprob:
    assert head.group is not None
    found = vocab_parallel_logprob(
        hidden,
        head.weight,
        targets,
        head.group,
        vocab_start=head.start,
        vocab_size=head.vocab,
        bias_shard=head.bias,
        **options,
    )
    return LinearLogprob(*found)


def _held(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, may_split: bool) -> _Held:
    if isinstance(hidden, DTensor):
        raise TypeError(
            "hidden is a DTensor: expected this process's own rows as a plain tensor; use "
            "hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])"
        )
    vocab = weight.shape[0]
    split = _vocabulary_dim(weight) if may_split and isinstance(weight, DTensor) else None
    if split is None or not isinstance(weight, DTensor):
        return _Held(_gather(weight), None if bias is None else _gather(bias), vocab)
    mesh = weight.device_mesh
    place = bias.device_mesh if isinstance(bias, DTensor) else "no mesh"
    if bias is not None and place != mesh:
        raise ValueError(
            f"the weight's vocabulary is spread over {mesh}, but the bias lies on {place}; "
            "distribute it over the same mesh, as transformers' plans do"
        )
    _, start = Shard.local_shard_size_and_offset(
        vocab, mesh.size(split), mesh.get_local_rank(split)
    )
    here = None if bias is None else _gather(bias, split)
    return _Held(_gather(weight, split), here, vocab, mesh.get_group(split), start)


def _vocabulary_dim(weight: DTensor) -> int | None:
    """The mesh dimension along which ranks compute with their part of the vocabulary."""
    names = weight.device_mesh.mesh_dim_names or ()
    for dim, name in enumerate(names):
        if name == TENSOR_PARALLEL and weight.placements[dim] == Shard(0):
            return dim
    return None


def _gather(tensor: Tensor, split: int | None = None) -> Tensor:
    """The plain tensor this rank computes with: gathered along every mesh dimension but `split`."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"a head's weight and bias must be sharded or replicated, got {tensor.placements}; "
            "redistribute it to Replicate() or Shard(0)"
        )
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    placements: list[Placement] = [Replicate() for _ in names]
    gradients: list[Placement] = [
        Replicate() if name == TENSOR_PARALLEL else Partial("avg") for name in names
    ]
    if split is not None:
        placements[split] = gradients[split] = Shard(0)
    return tensor.redistribute(placements=placements).to_local(grad_placements=gradients)


__all__ = ["parallel_linear_cross_entropy", "parallel_linear_logprob"]
