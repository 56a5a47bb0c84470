"""`AdamW8bit`: `torch.optim.AdamW` with weights in bf16 and moments in 8 bits.

The step is `adamw_8bit_`: one launch a parameter group (and a dtype). Moments of parameters below
4096 elements stay in float32, as bitsandbytes keeps them: norms and biases, whose few values matter
more than their bytes. Weights in bf16 are rounded at random; the random words follow from seed,
step, place of the parameter and element, so that a resumed run is the same run, bit for bit.

Parameters that are DTensors are updated shard by shard, without communication; their moments are
DTensors of the same placement. Blocks of 256 are cut from the local shard, so absmax is
[shards, blocks of the largest shard], a row a shard: a checkpoint can be loaded at the same number
of shards, and is refused by its shape at another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._dynamic_map import num_blocks
from .adamw_8bit import AdamWState, adamw_8bit_, adamw_state

__all__ = ["AdamW8bit"]

_MIN_8BIT = 4096  # elements
_STATE = AdamWState._fields


class AdamW8bit(Optimizer):
    """AdamW with 8-bit moments and stochastic rounding, a drop-in for `torch.optim.AdamW`.

    Args:
        params: parameters or groups of them, float32 or bfloat16, contiguous, DTensors or not.
        lr, betas, eps, weight_decay: AdamW's; each may differ by group.
        stochastic_rounding: of bfloat16 weights; False rounds to nearest.
        seed: of the rounding, 32 bits. It is saved with the state. Replicas of one model must have
            the same.

    Raises:
        ValueError: numbers out of their range, parameters that are not contiguous.
        TypeError: parameters of other dtypes; at a step, gradients that are sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
            raise ValueError(
                f"lr, eps and weight_decay must not be negative, got {lr}, {eps}, {weight_decay}"
            )
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {seed}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; raises what the constructor raises, and changes nothing then."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for param in params:
            if param.dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(
                    f"AdamW8bit trains float32 and bfloat16, got a parameter of {param.dtype}; "
                    "cast it, or use torch.optim.AdamW"
                )
            if not _local(param).is_contiguous():
                raise ValueError(
                    f"parameters must be contiguous, got strides {param.stride()} of "
                    f"{tuple(param.shape)}; call contiguous() before the optimizer is made"
                )
        super().add_param_group({**param_group, "params": params})

    @overload
    def step(self, closure: None = None, *, grad_scale: Tensor | float | None = None) -> None: ...
    @overload
    def step(
        self, closure: Callable[[], float], *, grad_scale: Tensor | float | None = None
    ) -> float: ...
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients.
            grad_scale: what gradients are multiplied by, on the way: a number, or one float32 on
                the device of the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            chosen = [(p, place + i) for i, p in enumerate(group["params"]) if p.grad is not None]
            place += len(group["params"])
            if chosen:
                self._step_group(group, chosen, grad_scale)
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        chosen: list[tuple[Tensor, int]],
        grad_scale: Tensor | float | None,
    ) -> None:
        steps = []
        for param, _ in chosen:
            if param.grad.is_sparse:  # type: ignore[union-attr]
                raise TypeError("AdamW8bit takes dense gradients; use torch.optim.SparseAdam")
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state.update(_first_state(param))
            state["step"] += 1
            steps.append(int(state["step"]))
        adamw_8bit_(
            [_local(param) for param, _ in chosen],
            [_local(param.grad) for param, _ in chosen],  # type: ignore[arg-type]
            [_local_state(param, self.state[param]) for param, _ in chosen],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            steps=steps,
            grad_scale=grad_scale,
            seed=group["seed"] if group["stochastic_rounding"] else None,
            streams=[place | _shard(param) << 32 for param, place in chosen],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, bit for bit: states keep their dtypes.

        Raises:
            ValueError: groups, or shapes of states, that are not those of this optimizer.
        """
        # Optimizer's own would cast bytes and absmax to the dtype of the weights.
        super().load_state_dict({**state_dict, "state": {}})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(ids, params, strict=True):
            given = state_dict["state"].get(index)
            if not given:
                continue
            fresh = _first_state(param)
            for name, tensor in fresh.items():
                saved = given.get(name)
                found = None if saved is None else (tuple(saved.shape), saved.dtype)
                if found != (tuple(tensor.shape), tensor.dtype):
                    raise ValueError(
                        f"{name} of a parameter {tuple(param.shape)} must be "
                        f"{tuple(tensor.shape)} of {tensor.dtype}, got {found}: a state of another "
                        "optimizer or another number of shards"
                    )
                tensor.copy_(saved)
            step = torch.as_tensor(given["step"], dtype=torch.float32).cpu().clone()
            self.state[param] = {"step": step, **fresh}


def _local(tensor: Tensor) -> Tensor:
    """The shard of this process."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _is_dtensor(tensor: Tensor) -> bool:
    # Without torch.distributed there are none.
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import

    return isinstance(tensor, DTensor)


def _shard(param: Tensor) -> int:
    """Which of its shards this process holds: the same on every replica of it."""
    if not _is_dtensor(param):
        return 0
    mesh, index = param.device_mesh, 0  # type: ignore[attr-defined]
    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return index


def _first_state(param: Tensor) -> dict[str, Tensor]:
    is_8bit = param.numel() >= _MIN_8BIT
    local = adamw_state(_local(param), is_8bit=is_8bit)
    state = dict(zip(_STATE, local, strict=True))
    if not _is_dtensor(param):
        return state
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"parameters must be sharded or replicated, got {placements}")
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = DTensor.from_local(
            state[name],
            mesh,
            placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
    largest = list(param.shape)
    rows = [Replicate() if placement.is_replicate() else Shard(0) for placement in placements]
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            largest[placement.dim] = -(-largest[placement.dim] // mesh.size(dim))
    blocks = num_blocks(math.prod(largest)) if is_8bit else 0
    for name in ("absmax", "absmax_sq"):
        row = state[name].new_zeros(1, blocks)
        state[name] = DTensor.from_local(row, mesh, rows, run_check=False)
    return state


def _local_state(param: Tensor, state: dict[str, Tensor]) -> AdamWState:
    local = AdamWState(*(_local(state[name]) for name in _STATE))
    if not _is_dtensor(param):
        return local
    blocks = num_blocks(_local(param).numel()) if local.exp_avg.dtype == torch.uint8 else 0
    return local._replace(absmax=local.absmax[0, :blocks], absmax_sq=local.absmax_sq[0, :blocks])
