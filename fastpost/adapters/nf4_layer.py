"""A frozen linear layer whose weight is 4-bit NormalFloat bytes, without bitsandbytes.

It is an `nn.Linear` to PEFT, which wraps it in its own `lora.Linear`, and its state dict has
bitsandbytes' keys (`nf4_state`). The bytes are a parameter, the rest buffers; casts of the model
change the dtype it computes in and never those. `layer.weight` reads as the dense matrix:
operators on it unpack, and what is assigned to its `.data` is quantised again, which is how PEFT
merges. That rounds the merged weight to 4 bits (a warning says so); `fastpost merge` writes exact
16-bit weights.

Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastpost.adapters.nf4_state import QUANT_STATE, companions, pack_state, unpack_state
from fastpost.backbone import FastpostWarning
from fastpost_kernels import Nf4Weight, nf4_dequantize, nf4_linear, nf4_quantize

__all__ = ["Nf4Linear"]

_BUFFERS = ("absmax", "nested_absmax", "nested_code", "offset")


class Nf4Linear(nn.Linear):
    """`x W^T + bias` for a frozen 4-bit W [N, K].

    Args:
        weight: from `nf4_quantize`, or bitsandbytes' bytes; its tensors are kept, not copied.
        bias: [N] or None.
        compute_dtype: what x is cast to outside autocast, and W is unpacked to; the result has
            x's dtype. `layer.to(dtype)` and the like change it.

    Raises:
        TypeError: `compute_dtype` is not float32, bfloat16 or float16.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        weight: Nf4Weight,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        # not nn.Linear's, which would allocate the dense weight
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.block_size = weight.block_size
        self.storage = weight.packed.dtype
        self.compute_dtype = _checked(compute_dtype)
        self.packed = nn.Parameter(weight.packed, requires_grad=False)
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.register_parameter("bias", bias)

    @property
    def nf4(self) -> Nf4Weight:
        """The weight as the kernels take it.

        Raises:
            TypeError: something has cast the bytes or their scales.
        """
        # straight from the tables: a module's attributes cost ten times as much
        packed, buffers = self._parameters["packed"], self._buffers
        absmax, nested = buffers["absmax"], buffers["nested_absmax"]
        assert packed is not None and absmax is not None
        absmax_dtype = torch.float32 if nested is None else torch.uint8
        if packed.dtype != self.storage or absmax.dtype != absmax_dtype:
            raise TypeError(
                f"the bytes of a 4-bit layer were cast from {self.storage} to {packed.dtype} "
                f"(absmax from {absmax_dtype} to {absmax.dtype}), which destroys them: cast "
                "the model with .to(dtype), not its parameters one by one"
            )
        return Nf4Weight(
            packed,
            absmax,
            (self.out_features, self.in_features),
            self.block_size,
            nested,
            buffers["nested_code"],
            buffers["offset"],
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[N, K] in `compute_dtype`, unpacked by each operator that is called on it."""
        return _LiveWeight(self)

    @property
    def W_q(self) -> Tensor:
        """The bytes. PEFT calls `dequantize` of layers that have this attribute."""
        return self.packed

    def dequantize(self) -> Tensor:
        """[N, K] in `compute_dtype`, a fresh tensor."""
        return nf4_dequantize(self.nf4, self.compute_dtype)

    def requantize(self, weight: Tensor) -> None:
        """Puts `weight` [N, K] in place of the layer's, rounded to 4 bits.

        Raises:
            ValueError: another shape.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"the layer's weight is [{self.out_features}, {self.in_features}], got "
                f"{tuple(weight.shape)}"
            )
        found = nf4_quantize(
            weight.to(self.packed.device),
            block_size=self.block_size,
            double_quant=self.nested_absmax is not None,
            storage=self.storage,
        )
        self._copy_from(found)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if torch.is_autocast_enabled(x.device.type):
            return nf4_linear(x, self.nf4, self.bias)
        return nf4_linear(x.to(self.compute_dtype), self.nf4, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nf4, block_size={self.block_size}"

    @torch.no_grad()
    def _copy_from(self, weight: Nf4Weight) -> None:
        # In place, so that autograd's version tells caches of the weight's norms; the others are
        # replaced, as layers share the table of `nested_code`.
        self.packed.copy_(weight.packed.view_as(self.packed))
        for name in _BUFFERS:
            if (found := getattr(weight, name)) is not None:
                self._buffers[name] = found.to(self.packed.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        moved = _bytes_only(fn, self.packed.data)
        if torch._has_compatible_shallow_copy_type(self.packed.data, moved):
            self.packed.data = moved
        else:
            self.packed = nn.Parameter(moved, requires_grad=False)
        for name in _BUFFERS:
            if (held := getattr(self, name)) is not None:
                self._buffers[name] = _bytes_only(fn, held)
        self.compute_dtype = _checked(fn(self.packed.new_empty(0, dtype=self.compute_dtype)).dtype)
        # nn.Module's own takes the bias, with what is not to be cast out of its sight
        parameters, buffers = self._parameters, self._buffers
        self._parameters, self._buffers = {"bias": parameters["bias"]}, {}
        try:
            super()._apply(fn, recurse)
            parameters["bias"] = self._parameters["bias"]
        finally:
            self._parameters, self._buffers = parameters, buffers
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.packed if keep_vars else self.packed.detach()
        for key, tensor in pack_state(self.nf4, self.compute_dtype).items():
            destination[f"{prefix}weight.{key}"] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        wanted = [name, *(f"{name}.{key}" for key in companions(self.nf4))]
        if self.bias is not None:
            wanted.append(prefix + "bias")
        missing = [key for key in wanted if key not in state_dict]
        missing_keys.extend(missing)
        if strict:
            known = {*wanted, f"{name}.{QUANT_STATE}"}
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in known)
        if missing:
            return
        try:
            found = unpack_state(name, state_dict[name], state_dict.__getitem__)
            if found.shape != self.nf4.shape or found.block_size != self.block_size:
                raise ValueError(
                    f"{name} is {found.shape} in blocks of {found.block_size}, the layer "
                    f"{self.nf4.shape} in blocks of {self.block_size}"
                )
            self._copy_from(found._replace(packed=found.packed.view(self.storage)))
            if self.bias is not None:
                self.bias.data.copy_(state_dict[prefix + "bias"])
        except (ValueError, RuntimeError) as error:
            error_msgs.append(str(error))


class _LiveWeight(Tensor):
    """The dense weight of a layer, which exists only while an operator reads it."""

    _layer: Nf4Linear

    @staticmethod
    def __new__(cls, layer: Nf4Linear) -> _LiveWeight:
        shape = (layer.out_features, layer.in_features)
        found = Tensor._make_wrapper_subclass(
            cls, shape, dtype=layer.compute_dtype, device=layer.packed.device
        )
        found._layer = layer
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self._layer.dequantize()

    @data.setter
    def data(self, value: Tensor) -> None:
        warnings.warn(
            "the weight of a 4-bit layer was replaced (by a merge, an unmerge or an adapter's "
            "initialisation) and is rounded to 4 bits again: outputs change a little, and "
            "unmerging does not restore it exactly. 'fastpost merge' merges into 16-bit weights",
            FastpostWarning,
            stacklevel=2,
        )
        self._layer.requantize(value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func} would write into a temporary copy of a 4-bit weight: assign to .data, "
                "which quantises it"
            )
        args, kwargs = tree_map_only(cls, lambda w: w._layer.dequantize(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_LiveWeight({tuple(self.shape)}, {self.dtype}, {self.device})"


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"a 4-bit layer computes in float32, bfloat16 or float16, got {dtype}")
    return dtype


def _bytes_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn` on the bytes, so that it moves and cannot cast."""
    return fn(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)
