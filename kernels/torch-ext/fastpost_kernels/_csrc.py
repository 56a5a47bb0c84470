"""The C++ library of CPU passes, opened with ctypes, or None.

The library has a plain C ABI and does not link an OpenMP runtime: its calls resolve to the one that
torch loaded, so torch must be imported first (it is, below) and both share one thread pool. A Hub
copy ships no compiled code, an install without a compiler skips it, and a library of other sources
would be called with the wrong arguments: all get None and one warning.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "BrokenLibrary",
    "advise_huge_pages",
    "library",
    "library_problem",
    "num_threads",
    "open_library",
]

_BUILD = "install from source with a C++ compiler"
_REBUILD = "python -m pip install --force-reinstall --no-deps fastpost, or -e . in its sources"

# Below this a buffer comes from the heap, whose pages are warm.
_HUGE_PAGES_FROM = 4 << 20

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_CODES: dict[Any, str] = {_POINTER: "p", _INT: "i", _LONG: "l", _FLOAT: "f"}  # csrc/arguments.h

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
    "fastpost_dropout": (
        [_INT, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG, _FLOAT, _POINTER, _INT, _INT]
    ),
    "fastpost_column_scale_forward": (
        [_INT, _POINTER, _LONG, _LONG, _LONG] + [_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT]
    ),
    "fastpost_column_scale_backward": (
        [_INT, _POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER]
        + [_POINTER, _POINTER, _INT, _INT]
    ),
    "fastpost_dora_norms": (
        [_INT, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _FLOAT, _POINTER]
        + [_INT, _INT]
    ),
    "fastpost_nf4_unpack": (
        [_INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]
        + [_LONG, _LONG, _LONG, _LONG, _LONG, _POINTER, _LONG, _INT, _INT]
    ),
    "fastpost_transpose_16": [_POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _INT],
    "fastpost_advise_huge_pages": [_POINTER, _LONG],
    "fastpost_adamw_8bit": (
        [_INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER]
        + [_FLOAT, _INT, _LONG, _INT, _INT]
    ),
    "fastpost_accumulate": [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT, _INT],
}


class BrokenLibrary(Exception):
    """A compiled library is there but cannot serve; the message says why, `fix` what to do."""

    fix = _REBUILD


def open_library(folder: Path) -> ctypes.CDLL | None:
    """The compiled library in `folder` with its signatures declared, or None if there is none.

    Raises:
        BrokenLibrary: the file cannot be opened, or was built from other sources than this code.
    """
    # Of several, the one built for this Python, not what an earlier one left behind.
    paths = (folder / f"_csrc_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise BrokenLibrary(f"{path} cannot be opened ({reason})") from error
    for name, argument_types in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise BrokenLibrary(f"{path} is of another version: {name} is missing") from None
        built, wanted = _built_for(library, name), "".join(_CODES[x] for x in argument_types)
        if built is not None and built != wanted:
            raise BrokenLibrary(
                f"{path} is of another version: {name} takes {built or 'nothing'} there, "
                f"{wanted or 'nothing'} here"
            )
        function.argtypes = argument_types
        function.restype = ctypes.c_int if name == "fastpost_simd" else None
    return library


def _built_for(library: ctypes.CDLL, name: str) -> str | None:
    """The arguments of a function as csrc/arguments.h wrote them down; None if it did not."""
    try:
        first = ctypes.c_char.in_dll(library, f"{name}_arguments")
    except ValueError:
        return None
    return ctypes.string_at(ctypes.addressof(first)).decode()


@functools.cache
def _opened() -> tuple[ctypes.CDLL | None, tuple[str, str] | None]:
    """The library beside this file, or why there is none and what to do, with one warning."""
    try:
        found = open_library(Path(__file__).parent)
    except BrokenLibrary as error:
        problem = str(error), error.fix
    else:
        if found is not None:
            return found, None
        problem = "not built", _BUILD
    warnings.warn(
        f"the compiled CPU passes of fastpost_kernels do not serve: {problem[0]}. CPU tensors use "
        f"the slower torch backend. Fix: {problem[1]}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None, problem


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file; None, with one warning, if it is not built or broken."""
    return _opened()[0]


def library_problem() -> tuple[str, str] | None:
    """Why `library()` is None and what to do, or None."""
    return _opened()[1]


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
