"""The tensors that a 4-bit weight is stored as, by the keys bitsandbytes gives them.

Beside `X.weight`, the bytes, stand `X.weight.absmax`, `.quant_map`, with double quantisation
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`: JSON as bytes, with
the shape, the block size, the dtype before quantisation and the offset of absmax.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import Nf4Weight, nf4_dequantize

__all__ = ["QUANT_STATE", "companions", "pack_state", "unpack_state"]

QUANT_STATE = "quant_state.bitsandbytes__nf4"
_NESTED_BLOCK = 256


@functools.cache
def _levels() -> Tensor:
    """The 16 values of a nibble, [16] float32."""
    packed = torch.tensor([(2 * i << 4) | (2 * i + 1) for i in range(8)], dtype=torch.uint8)
    weight = Nf4Weight(packed, torch.ones(1), (1, 16), 32)
    return nf4_dequantize(weight, torch.float32, backend="torch").reshape(-1)


def companions(weight: Nf4Weight) -> list[str]:
    """The keys beside `X.weight`, without `X.weight.`."""
    nested = [] if weight.nested_absmax is None else ["nested_absmax", "nested_quant_map"]
    return ["absmax", "quant_map", *nested, QUANT_STATE]


def pack_state(weight: Nf4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Key without `X.weight.` -> tensor; `dtype` is what stock layers dequantise to."""
    about: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    # Tables that layers share are copied: safetensors refuses tensors that share memory.
    tensors = {"absmax": weight.absmax, "quant_map": _levels().to(weight.absmax.device, copy=True)}
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.offset is not None
        tensors |= {
            "nested_absmax": weight.nested_absmax,
            "nested_quant_map": weight.nested_code.clone(),
        }
        about |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": 0.0 if weight.offset.is_meta else weight.offset.item(),
        }
    tensors[QUANT_STATE] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors


def unpack_state(name: str, packed: Tensor, read: Callable[[str], Tensor]) -> Nf4Weight:
    """The weight called `name`, whose bytes are `packed`.

    Args:
        name: "X.weight", for messages and as the beginning of what `read` is asked for.
        packed: the bytes, in any dtype.
        read: key -> tensor.

    Raises:
        ValueError: levels, nested blocks or a shape that are not those of a 4-bit NormalFloat.
    """
    about = json.loads(bytes(read(f"{name}.{QUANT_STATE}").tolist()))
    levels = read(f"{name}.quant_map").float().cpu()
    is_known = about["quant_type"] == "nf4" and torch.allclose(levels, _levels(), atol=1e-6)
    if not is_known or about.get("nested_blocksize", _NESTED_BLOCK) != _NESTED_BLOCK:
        raise ValueError(
            f"{name} is not stored as NF4 with absmax in blocks of {_NESTED_BLOCK}: "
            f"{about['quant_type']}, {about.get('nested_blocksize')}; quantise its 16-bit model "
            "instead"
        )
    outputs, inputs = about["shape"]
    absmax = read(f"{name}.absmax").reshape(-1)
    size = (int(outputs), int(inputs))
    if "nested_offset" not in about:
        return Nf4Weight(packed, absmax, size, about["blocksize"])
    return Nf4Weight(
        packed,
        absmax,
        size,
        about["blocksize"],
        read(f"{name}.nested_absmax").reshape(-1),
        read(f"{name}.nested_quant_map"),
        torch.tensor(about["nested_offset"], dtype=torch.float32),
    )
