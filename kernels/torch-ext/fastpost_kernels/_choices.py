"""Named choices that change speed and never results, and where the measured ones are kept.

Which of two right ways is faster depends on the GPU, so nothing here is guessed: every choice has a
conservative default, and another option is taken only if `fastpost tune` measured it faster on this
GPU, at this shape, with these versions. Its findings lie in one JSON file per device:

    $FASTPOST_CACHE or ~/.cache/fastpost, then tune/<device>.json
    {"format": 1, "device": "NVIDIA ...", "versions": {...},
     "choices": {"head_fold": {"M4096-H4096-V131072-bfloat16": "fused"}}, "measured": [...]}

A file that cannot be read, is another device's or belongs to other versions costs one warning and
the defaults, never an exception. CPUs have no choices: they always take the defaults.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "CHOICES",
    "Stored",
    "Table",
    "adapted_shape",
    "attention_shape",
    "choices_file",
    "choose",
    "device_name",
    "forget",
    "head_shape",
    "layer_shape",
    "override",
    "read",
    "save",
    "versions",
    "weight_shape",
]

FORMAT = 1
# Options of every choice, the conservative one first.
CHOICES: dict[str, tuple[str, ...]] = {
    # linear_logprob's statistics: cuBLAS and tiles, or the kernel of `_fused_fold_triton.py`
    "head_fold": ("tiles", "fused"),
    # rows x columns of a tile of logits
    "head_tile": ("4096x4096", "2048x4096", "8192x4096", "4096x2048", "8192x2048"),
    # lora_linear: two GEMMs of the library, or one in Triton that goes on over A's rank
    "lora_linear": ("library", "triton"),
    # nf4_linear: rows up to which one GEMM unpacks as it goes, instead of unpacking to memory first
    "nf4_rows": ("64", "0", "16", "32", "128", "256"),
    # rows x keys x warps x stages of prefix attention's kernels
    "prefix_forward": ("default", "128x128x8x2", "128x64x8x3", "128x64x4x2", "64x64x4x3"),
    "prefix_grad_query": ("default", "128x64x8x2", "64x64x4x2", "64x64x8x3", "64x32x4x2"),
    "prefix_grad_key": ("default", "64x64x8x2", "64x128x8x2", "32x64x4x3", "64x64x4x2"),
}

# Choice -> shape class -> option.
Table = dict[str, dict[str, str]]

_overrides: dict[str, str] = {}


class Stored(NamedTuple):
    """What a file holds: `problem` says why `table` is empty although the file is there."""

    path: Path
    table: Table
    problem: str | None = None


def choose(name: str, device: torch.device, shape: str) -> str:
    """The option of choice `name` for a shape class on `device`; the default if none is stored."""
    if name in _overrides:
        return _overrides[name]
    default = CHOICES[name][0]
    device_is = device_name(device)
    if device_is is None:
        return default
    return _loaded(device_is).get(name, {}).get(shape, default)


@contextmanager
def override(options: Mapping[str, str]) -> Iterator[None]:
    """`choose` returns `options` for every device and shape, in all threads: for whoever measures.

    Raises:
        ValueError: an unknown choice or option.
    """
    problem = _problem_of({name: {"any": option} for name, option in options.items()})
    if problem is not None:
        raise ValueError(problem)
    before = dict(_overrides)
    _overrides.update(options)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def head_shape(rows: int, width: int, vocab: int, dtype: torch.dtype) -> str:
    """The shape class of a head: sizes to the nearest power of two."""
    return f"M{_nearest(rows)}-{weight_shape(width, vocab, dtype)}"


def weight_shape(width: int, vocab: int, dtype: torch.dtype) -> str:
    """The shape class of a head whatever its rows."""
    return f"H{_nearest(width)}-V{_nearest(vocab)}-{_name(dtype)}"


def adapted_shape(rows: int, weight: tuple[int, ...], rank: int, dtype: torch.dtype) -> str:
    """The shape class of a product with a weight of these two sizes and an adapter."""
    inner, outer = map(_nearest, weight)
    return f"M{_nearest(rows)}-K{inner}-N{outer}-R{_nearest(rank)}-{_name(dtype)}"


def layer_shape(weight: tuple[int, ...], dtype: torch.dtype) -> str:
    """The shape class of a layer whatever its rows; `weight` is [N, K] as the layer stores it."""
    outer, inner = map(_nearest, weight)
    return f"K{inner}-N{outer}-{_name(dtype)}"


def attention_shape(head_size: int, dtype: torch.dtype) -> str:
    """The shape class of an attention: the head size as it is."""
    return f"D{head_size}-{_name(dtype)}"


def _nearest(size: int) -> int:
    return 1 << round(math.log2(max(1, size)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str | None:
    """What the driver calls a GPU; None for everything that has no choices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _gpu_name(index)


@lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def choices_file(device_is: str) -> Path:
    """Where the choices of the device of that name are kept."""
    root = Path(os.environ.get("FASTPOST_CACHE") or Path.home() / ".cache/fastpost").expanduser()
    return root / "tune" / (re.sub(r"[^A-Za-z0-9.]+", "-", device_is).strip("-") + ".json")


@lru_cache
def versions() -> dict[str, str]:
    """What timings depend on: the kernels' own sources, torch and triton."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "absent"
    own = digest.hexdigest()[:16]
    return {"fastpost_kernels": own, "torch": str(torch.__version__), "triton": triton}


def read(device_is: str) -> Stored:
    """The stored choices of a device. Never raises; an absent file is an empty table."""
    try:
        path = choices_file(device_is)
    except RuntimeError as error:  # no home folder
        return Stored(Path("fastpost"), {}, f"cannot be found: {error}; set FASTPOST_CACHE")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Stored(path, {})
    except (OSError, ValueError, RecursionError) as error:
        return Stored(path, {}, f"cannot be read: {error}")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return Stored(path, {}, f"is not a file of format {FORMAT}")
    if found.get("device") != device_is:
        return Stored(path, {}, f"was measured on {found.get('device')!r}, this is {device_is!r}")
    if found.get("versions") != versions():
        return Stored(path, {}, "was measured with other versions of the kernels, torch or triton")
    problem = _problem_of(found.get("choices"))
    return Stored(path, {} if problem else found["choices"], problem)


def _problem_of(table: Any) -> str | None:
    """What is wrong with a table of choices, if anything."""
    if not isinstance(table, dict):
        return "holds no table of choices"
    for name, by_shape in table.items():
        if name not in CHOICES:
            return f"names an unknown choice {name!r}; choices: {', '.join(CHOICES)}"
        if not isinstance(by_shape, dict):
            return f"holds no options of {name!r} by shape"
        for option in by_shape.values():
            if option not in CHOICES[name]:
                return f"{name} has no option {option!r}; options: {', '.join(CHOICES[name])}"
    return None


@lru_cache
def _loaded(device_is: str) -> Table:
    found = read(device_is)
    if found.problem is not None:
        warnings.warn(
            f"{found.path} {found.problem}. Kernels take their defaults; `fastpost tune` measures "
            "again, `fastpost tune --reset` removes the file.",
            RuntimeWarning,
            stacklevel=3,
        )
    return found.table


def forget() -> None:
    """Read the files again when they are next needed: they changed on disk."""
    _loaded.cache_clear()


def save(device_is: str, table: Table, measured: list[dict[str, Any]]) -> Path:
    """Write the choices of a device, all at once or not at all; `measured` is for people.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an unknown choice or option.
    """
    problem = _problem_of(table)
    if problem is not None:
        raise ValueError(problem)
    path = choices_file(device_is)
    content = {
        "format": FORMAT,
        "device": device_is,
        "versions": versions(),
        "choices": table,
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    forget()
    return path
