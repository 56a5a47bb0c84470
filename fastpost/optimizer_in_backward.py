"""The optimizer's step inside the backward: a layer is updated and its gradients freed at once.

A hook on each trained parameter counts the gradients of its decoder layer (of embeddings, final
norm and head each parameter counts alone). With the layer's last one the optimizer steps: whatever
holds a gradient then is complete, since autograd adds to a parameter once a backward, and is
updated in its group, at its rate and with its state as ever. Then those gradients are freed: at
most a layer's are alive. The trainer's own call of `step` finds what is left, parameters of layers
of which a part got no gradient. AdamW's update of a tensor depends on no other tensor, so the run
is the usual one, bit for bit; checkpoints are the same, and runs of both kinds go on from them.
Under FSDP2 the hooks are called with gradients that are reduced and sharded, once a layer.

What looks at all gradients before it decides cannot be had: clipping by the global norm, the loss
scale of fp16, a second backward in a step, leaving out a bad step. A run that asks for it is
refused.

The idea: Lv et al., "Full parameter fine-tuning for large language models with limited resources"
(arXiv:2306.09782), section 3.1, there with SGD.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from accelerate.state import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastpost.health.monitor import HealthMonitor
from fastpost.health.non_finite import NonFinite
from fastpost_kernels import AdamW8bit

__all__ = ["BackwardSteps", "refuse_fields", "refuse_surroundings"]

_ADAMWS = ("adamw_torch", "adamw_torch_fused")
_LAYER = re.compile(r"(?:.*?\.)?layers\.\d+(?=\.)")


class BackwardSteps:
    """Hooks that step `optimizer` during the backwards of `model`, until `remove`.

    Args:
        model: as it is trained, sharded or not; the names of its parameters say their layers.
        optimizer: `torch.optim.AdamW` or `AdamW8bit` over parameters of `model`.

    Raises:
        TypeError: another optimizer, whose step may look at more than one tensor.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        # the exact classes: what is derived from them may look at all gradients
        if type(optimizer) not in (torch.optim.AdamW, AdamW8bit):
            raise TypeError(
                "optimizer_in_backward=True steps torch.optim.AdamW or AdamW8bit, got "
                f"{type(optimizer).__qualname__}; pass one of these, or set it to False"
            )
        self._optimizer = optimizer
        self._missing: dict[str, int] = {}  # gradients of the step's that a layer waits for
        self._norms: dict[str, Tensor] = {}  # of the step's gradients
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trained]
        self._handles = [self._watch(name, parameter) for name, parameter in trained]
        self.begin()

    def begin(self) -> None:
        """To be called before each backward: its gradients are those of a new step."""
        self._norms.clear()
        self._missing.clear()
        for name in self._names:
            layer = layer_of(name)
            self._missing[layer] = self._missing.get(layer, 0) + 1

    def _watch(self, name: str, parameter: nn.Parameter) -> Any:
        layer = layer_of(name)

        def take(parameter: Tensor) -> None:
            if name in self._norms:
                raise RuntimeError(
                    f"{name} got a second gradient in one step and was updated with the first: "
                    "optimizer_in_backward=True takes one backward a step; set it to False"
                )
            assert parameter.grad is not None
            self._norms[name] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self._missing[layer] -= 1
            if self._missing[layer] == 0:
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)

        return parameter.register_post_accumulate_grad_hook(take)

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients of the last backward, [] float32; with shards, of all of them."""
        if not self._norms:
            return torch.zeros(())
        return _whole(torch.linalg.vector_norm(torch.stack(list(self._norms.values()))))

    def tensors_without_gradient(self) -> list[str]:
        """Names of the parameters that the last backward gave no finite gradient."""
        names = list(self._norms)
        norms = _whole(torch.stack([self._norms[name] for name in names])) if names else None
        finite = {} if norms is None else dict(zip(names, norms.isfinite().tolist(), strict=True))
        return [name for name in self._names if not finite.get(name, False)]

    def remove(self) -> None:
        """From now on gradients are kept, and the optimizer steps when it is asked to."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def layer_of(name: str) -> str:
    """The decoder layer that a parameter belongs to, or its own name."""
    found = _LAYER.match(name)
    return found.group() if found else name


def refuse_fields(args: Any) -> None:
    """Refuse a configuration that needs all gradients at once, or updates at one moment.

    Raises:
        ValueError: names the field, its value and what to set it to.
    """
    if not args.optimizer_in_backward:
        return
    conflicts = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, 1, "sums gradients"),
        "max_grad_norm": (args.max_grad_norm, 0.0, "clips by the norm of all gradients"),
        "fp16": (args.fp16, False, "looks for overflow in all gradients before it steps"),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            False,
            "repeats a step of which a part is done already",
        ),
        "enable_jit_checkpoint": (
            args.enable_jit_checkpoint,
            False,
            "may save between backward and step",
        ),
    }
    for name, (given, wanted, why) in conflicts.items():
        if given not in (wanted, None):
            raise ValueError(
                f"{name}={given} {why}, and optimizer_in_backward=True has updated and freed them "
                f"layer by layer; set {name}={wanted}, or optimizer_in_backward=False"
            )
    if args.optimizer is None and str(getattr(args.optim, "value", args.optim)) not in _ADAMWS:
        raise ValueError(
            f"optim={str(getattr(args.optim, 'value', args.optim))!r} is not stepped in the "
            f"backward; take one of {', '.join(_ADAMWS)}, or optimizer='adamw_8bit', or set "
            "optimizer_in_backward=False"
        )


def refuse_surroundings(trainer: Any) -> None:
    """Refuse processes and callbacks that come between a gradient and its step.

    Args:
        trainer: a `transformers.Trainer`, asked when it is made and when it trains.

    Raises:
        ValueError: gradients are averaged after the hooks (DataParallel, DDP), or a monitor is to
            leave out steps.
    """
    kind = trainer.accelerator.distributed_type
    if trainer.args.n_gpu > 1 or kind not in (DistributedType.NO, DistributedType.FSDP):
        raise ValueError(
            f"optimizer_in_backward=True under {kind} on {trainer.args.n_gpu} devices a process "
            "would step before gradients are averaged; shard with FSDP2 (fsdp=True), or set it to "
            "False"
        )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HealthMonitor) and any(
            isinstance(monitor, NonFinite) for monitor in callback.monitors
        ):
            raise ValueError(
                "HealthMonitor's NonFinite leaves out steps whose gradients are not finite, which "
                "optimizer_in_backward=True has done by then; pass HealthMonitor(monitors=[...]) "
                "without it, or set optimizer_in_backward=False"
            )
