"""The C++ library of CPU passes, opened with ctypes, or None.

The library has a plain C ABI and does not link an OpenMP runtime: its calls resolve to the one that
torch loaded, so torch must be imported first (it is, below) and both share one thread pool. A Hub
copy ships no compiled code, and an install without a compiler skips it: both get None and one
warning.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch

__all__ = ["advise_huge_pages", "library", "num_threads"]

# Below this a buffer comes from the heap, whose pages are warm.
_HUGE_PAGES_FROM = 4 << 20

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

# Argument types of every function, in the order of the C declarations in csrc/.
_SIGNATURES = {
    "fastpost_simd": [],
    "fastpost_logit_tile": (
        [_INT, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER]
        + [_FLOAT, _FLOAT, _FLOAT, _POINTER, _LONG, _INT, _INT, _INT, _INT]
    ),
    "fastpost_prefix_attention": (
        [_INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _INT, _INT]
    ),
    "fastpost_rms_norm_forward": (
        [_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _FLOAT, _POINTER, _POINTER, _INT, _INT]
    ),
    "fastpost_rms_norm_backward": (
        [_INT, _POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER]
        + [_POINTER, _POINTER, _POINTER, _INT, _INT]
    ),
    "fastpost_swiglu_forward": (
        [_INT, _POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT, _INT]
    ),
    "fastpost_swiglu_backward": (
        [_INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG]
        + [_POINTER, _POINTER, _INT, _INT]
    ),
    "fastpost_transpose_16": [_POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _INT],
    "fastpost_advise_huge_pages": [_POINTER, _LONG],
    "fastpost_accumulate": [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT, _INT],
}


def open_library(folder: Path) -> ctypes.CDLL | None:
    """The compiled library in `folder` with its signatures declared, or None if there is none."""
    for path in sorted(folder.glob("_csrc_native*.so")):
        library = ctypes.CDLL(str(path))
        for name, argument_types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = argument_types
            function.restype = ctypes.c_int if name == "fastpost_simd" else None
        return library
    return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file; None, with one warning, if it was not built."""
    found = open_library(Path(__file__).parent)
    if found is None:
        warnings.warn(
            "the compiled CPU passes of fastpost_kernels are not built; CPU tensors use the slower "
            "torch backend. Install from source with a C++ compiler to get them.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def num_threads() -> int:
    """Threads for one C++ call: torch's own setting."""
    return torch.get_num_threads()


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, freshly allocated, asked onto huge pages if it is a large CPU buffer."""
    size = tensor.untyped_storage().nbytes()
    if tensor.device.type == "cpu" and size >= _HUGE_PAGES_FROM:
        lib = library()
        if lib is not None:
            lib.fastpost_advise_huge_pages(tensor.data_ptr(), size)
    return tensor
