"""What this machine offers: Triton or its interpreter, the C++ library; the backend to take."""

from __future__ import annotations

import importlib.util

import torch

from . import _csrc

__all__ = [
    "AMD",
    "BACKENDS",
    "HAS_TRITON",
    "capability",
    "resolve_backend",
    "triton_is_interpreted",
]

BACKENDS = ("auto", "triton", "cpp", "torch")
# Instead of a compute capability: ROCm's numbers collide with NVIDIA's (gfx90a says 9.0).
AMD = -1
HAS_TRITON = importlib.util.find_spec("triton") is not None


def capability(device: torch.device) -> int:
    """90 for compute capability 9.0, AMD, or 0: the interpreter, or a GPU without this notion."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def triton_is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), that is, also on CPU."""
    if not HAS_TRITON:
        return False
    import triton  # optional dependency, and slow to import where it is not used

    return bool(triton.knobs.runtime.interpret)


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run: "triton", "cpp" or "torch".

    `auto` is Triton on GPUs, C++ on CPUs for fp32 and bf16, torch everywhere else (float64, or no
    compiled library). A backend asked for by name that cannot run raises instead of being replaced.
    """
    assert backend in BACKENDS
    single = dtype in (torch.float32, torch.bfloat16)
    if backend == "auto":
        if device.type in ("cuda", "xpu") and HAS_TRITON and single:
            return "triton"
        if device.type == "cpu" and single and _csrc.library() is not None:
            return "cpp"
        return "torch"
    if backend != "torch" and not single:
        raise ValueError(f"backend {backend!r} computes in float32 or bfloat16, got {dtype}")
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend 'triton' needs the package triton, which is not installed")
        if device.type == "cpu" and not triton_is_interpreted():
            raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1; use 'auto'")
    if backend == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpp' needs CPU tensors, got device {device}")
        if _csrc.library() is None:
            raise ValueError("backend 'cpp' needs the compiled csrc library; use 'auto' or 'torch'")
    return backend
