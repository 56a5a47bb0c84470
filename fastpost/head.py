"""The language-model head: from scored hidden states to log-probs, through the kernel.

Architectures differ in three scalars between `hidden @ weight.T` and the logits (a scale, a
softcap) and in where the weight lives (a plain tensor, one spread over processes, a copy kept by
PEFT's `modules_to_save`, a weight under PEFT's plain LoRA). Both are read here and nowhere else.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from fastpost.parallel_head import parallel_linear_cross_entropy, parallel_linear_logprob
from fastpost_kernels import HeadRows, LoraHead, PreferenceLogratio, preference_logratio


@dataclass(frozen=True)
class Head:
    """Scalars of the head and the options every call of the kernel takes.

    Attributes:
        logit_scale: factor before the softcap.
        softcap: `softcap * tanh(logits / softcap)`, or None.
        temperature: the logits are divided by it last.
        in_fp32: multiply in fp32 outside autocast.
        memory_budget: bytes of workspace, None for the kernel's default.
    """

    logit_scale: float
    softcap: float | None
    temperature: float
    in_fp32: bool
    memory_budget: int | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        temperature: float = 1.0,
        in_fp32: bool = False,
        memory_budget: int | None = None,
    ) -> Head:
        """Read the scalars from the model's configuration."""
        config = model.config.get_text_config()
        return cls(
            logit_scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            temperature=temperature,
            in_fp32=in_fp32,
            memory_budget=memory_budget,
        )

    def score(
        self, model: PreTrainedModel, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> Any:
        """Log-probs of targets `[M]` given hidden `[M, H]`, as the kernel's `LinearLogprob`."""
        weight, bias = _weights(model)
        hidden = hidden.to(weight.device)
        return parallel_linear_logprob(
            hidden,
            weight,
            targets.to(weight.device),
            bias,
            lora=_adapter(model),
            outputs=outputs,
            **self._options(hidden),
        )

    def cross_entropy(
        self,
        model: PreTrainedModel,
        hidden: Tensor,
        targets: Tensor,
        num_items: Tensor | float | None,
        outputs: tuple[str, ...] = (),
    ) -> Any:
        """Summed loss over `num_items` (mean if None), as the kernel's `LinearCrossEntropy`."""
        weight, bias = _weights(model)
        hidden = hidden.to(weight.device)
        return parallel_linear_cross_entropy(
            hidden,
            weight,
            targets.to(weight.device),
            bias,
            lora=_adapter(model),
            num_items=num_items,
            outputs=outputs,
            **self._options(hidden),
        )

    def rows(
        self, model: PreTrainedModel, hidden: Tensor, targets: Tensor, places: Tensor | None
    ) -> HeadRows:
        """Rows in front of this model's head, on its device; see `is_plain_head`.

        Raises:
            ValueError: an adapter is in force on lm_head.
        """
        if _adapter(model) is not None:
            raise ValueError(
                "policy and reference cannot be scored together with an adapter on lm_head; take "
                "'lm_head' out of target_modules"
            )
        weight, bias = _weights(model)
        here = None if places is None else places.to(weight.device)
        return HeadRows(hidden.to(weight.device), weight, targets.to(weight.device), bias, here)

    def logratio(
        self,
        policy: HeadRows,
        reference: HeadRows | Tensor,
        cu_seqlens: Tensor,
        token_weights: Tensor | None,
        outputs: tuple[str, ...],
    ) -> PreferenceLogratio:
        """Sequence log-probs of policy and reference, as the kernel's `PreferenceLogratio`."""
        return preference_logratio(
            policy,
            reference,
            cu_seqlens,
            token_weights=token_weights,
            outputs=outputs,
            **self._options(policy.hidden),
        )

    def _options(self, hidden: Tensor) -> dict[str, Any]:
        compute_dtype = None
        if self.in_fp32:
            compute_dtype = torch.float32
        elif torch.is_autocast_enabled(hidden.device.type):
            compute_dtype = torch.get_autocast_dtype(hidden.device.type)
        return {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "compute_dtype": compute_dtype,
            "memory_budget": self.memory_budget,
        }


def is_plain_head(model: PreTrainedModel) -> bool:
    """Whether the head is whole on this process, and no adapter is in force on it."""
    lm_head: Any = model.get_output_embeddings()
    lm_head = getattr(lm_head, "base_layer", lm_head)
    tensors = (lm_head.weight, getattr(lm_head, "bias", None))
    return _adapter(model) is None and not any(isinstance(t, DTensor) for t in tensors)


def unscorable_reason(model: PreTrainedModel) -> str | None:
    """Why the head cannot go through the kernel, or None if it can."""
    lm_head: Any = model.get_output_embeddings()
    if hasattr(lm_head, "base_layer"):
        reason = _unusable_adapter_reason(lm_head)
        if reason is not None:
            return f"an adapter sits on lm_head, {reason}; take 'lm_head' out of target_modules"
    weight = getattr(lm_head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return f"the output embedding is a {type(lm_head).__name__}, not a linear layer"
    if not weight.is_floating_point():
        return f"the weight of lm_head is quantised ({weight.dtype})"
    return None


def _unusable_adapter_reason(lm_head: Any) -> str | None:
    """Why an adapted head is more than `W + s B A`, or None if it is not."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # there if such a layer is
    if lora is None or type(lm_head) is not lora.Linear:
        return f"a {type(lm_head).__name__} of {type(lm_head).__module__}, not plain LoRA"
    if hasattr(lm_head.base_layer, "base_layer"):
        return "on top of another one"
    if lm_head.merged:
        return "merged into its weight; unmerge it"
    if lm_head.disable_adapters:
        return None
    names = _active_names(lm_head)
    if len(names) > 1:
        return f"and more than one is active ({', '.join(names)})"
    for name in names:
        if name in lm_head.lora_variant or lm_head.use_dora.get(name):
            return "a variant of LoRA (DoRA or another one)"
        if lm_head.lora_bias.get(name):
            return "with a bias of its own (lora_bias)"
        dropout = getattr(lm_head.lora_dropout[name], "p", 0.0)
        if lm_head.training and dropout > 0:
            return f"with lora_dropout {dropout}, which hides inputs from it but not from the head"
    return None


def _active_names(lm_head: Any) -> list[str]:
    return [name for name in lm_head.active_adapters if name in lm_head.lora_A]


def _adapter(model: PreTrainedModel) -> LoraHead | None:
    """The adapter in force on lm_head, as whole tensors; None without one."""
    lm_head: Any = model.get_output_embeddings()
    if not hasattr(lm_head, "base_layer") or lm_head.disable_adapters:
        return None
    for name in _active_names(lm_head):
        a, b = lm_head.lora_A[name].weight, lm_head.lora_B[name].weight
        return LoraHead(_whole(a), _whole(b), float(lm_head.scaling[name]))
    return None


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # Granite and MiniCPM3 divide by this field, HyperCLOVA X multiplies by it.
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor


def _weights(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, plain or spread. Called behind the backbone: FSDP2 has gathered them."""
    lm_head: Any = model.get_output_embeddings()
    lm_head = getattr(lm_head, "base_layer", lm_head)
    return lm_head.weight, getattr(lm_head, "bias", None)


def _whole(tensor: Any) -> Tensor:
    if isinstance(tensor, DTensor):
        # Without `grad_placements` the ranks' gradients would be added where they are averaged.
        return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    return tensor


__all__ = ["Head", "is_plain_head", "unscorable_reason"]
