"""What this machine offers for training, as findings in plain words."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from fastpost.cache_folder import cache_root
from fastpost.rewards.sandbox import Sandbox, SandboxUnavailable

__all__ = ["Finding", "environment", "interpreter"]

OPTIONAL = {
    "bitsandbytes": ("bnb", "4-bit weights and 8-bit optimisers"),
    "flash-attn": ("flash", "FlashAttention"),
    "liger-kernel": ("cuda", "Liger's kernels"),
    "vllm": ("vllm", "rollouts with vLLM"),
}
SIMD = ("portable code", "AVX2", "AVX-512", "AMX for bf16 attention, else AVX-512")


@dataclass(frozen=True)
class Finding:
    """`status` is "ok", "note" or "problem" (training cannot run); `fix` says what to do."""

    subject: str
    status: str
    text: str
    fix: str | None = None


def environment() -> list[Finding]:
    """Every finding, in the order they are shown."""
    found = [Finding("python", "ok", platform.python_version()), *_packages()]
    if not any(f.subject == "torch" and f.status == "problem" for f in found):
        found += [*_gpus(), *interpreter(), *_tuned(), _extension()]
    return [*found, _sandbox(), _cache()]


def _packages() -> list[Finding]:
    requirements = [Requirement(text) for text in importlib.metadata.requires("fastpost") or []]
    core = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    optional = [
        next(r for r in requirements if r.name == name and extra in str(r.marker))
        for name, (extra, _) in OPTIONAL.items()
    ]
    return [_package(r) for r in core] + [_package(r) for r in optional]


def _package(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    extra, purpose = OPTIONAL.get(name, (None, "all training"))
    bad = "note" if extra else "problem"
    target = f"fastpost[{extra}]" if extra else f"{name}{wanted}"
    fix = f"python -m pip install '{target}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, bad, f"missing: needed for {purpose}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, bad, f"{version}, supported: {wanted}", fix)
    return Finding(name, "ok", f"{version} (supported: {wanted or 'any'})")


def _gpus() -> list[Finding]:
    import torch  # may be missing, which is a finding of its own

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    if not torch.cuda.is_available():
        return [Finding("gpu", "note", f"none; torch is built for {build}; training uses the CPU")]
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
    found = [Finding("gpu driver", "ok", f"{words}; torch is built for {build}")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        found.append(Finding(f"gpu {index}", "ok", text))
    return found


def interpreter() -> list[Finding]:
    """One finding if Triton would interpret its kernels on the CPU instead of compiling them."""
    device = importlib.import_module("fastpost_kernels._device")
    if not device.triton_is_interpreted():
        return []
    text = "TRITON_INTERPRET is set: kernels run in Triton's interpreter on the CPU, never on a GPU"
    return [Finding("interpreter", "note", text, "unset TRITON_INTERPRET, then start again")]


def _tuned() -> list[Finding]:
    """Where each kind of GPU has its measured choices, and whether they are in use."""
    import torch  # may be missing, which is a finding of its own

    choices = importlib.import_module("fastpost_kernels._choices")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = []
    for name in dict.fromkeys(filter(None, map(choices.device_name, devices))):
        stored, fix = choices.read(name), "fastpost tune"
        count = sum(len(by_shape) for by_shape in stored.table.values())
        if stored.problem is not None:
            text = f"defaults on {name}: {stored.path} {stored.problem}"
            found.append(Finding("tuned", "note", text, fix))
        elif not stored.path.exists():
            text = f"defaults on {name}: nothing was measured on it"
            found.append(Finding("tuned", "note", text, fix))
        else:
            text = f"{count} measured choices on {name}, from {stored.path}"
            found.append(Finding("tuned", "ok", text))
    return found


def _extension() -> Finding:
    csrc = importlib.import_module("fastpost_kernels._csrc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library, problem = csrc.library(), csrc.library_problem()
    if problem is not None:
        reason, fix = problem
        return Finding("C++ passes", "note", f"{reason}; CPU training is slower", fix)
    return Finding("C++ passes", "ok", f"built, uses {SIMD[library.fastpost_simd()]}")


def _sandbox() -> Finding:
    try:
        Sandbox()
    except (SandboxUnavailable, OSError) as error:
        return Finding("sandbox", "note", f"no rewards for code here: {error}")
    return Finding("sandbox", "ok", "rewards for code can run programs")


def _cache() -> Finding:
    folder = cache_root()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    size = sum(p.lstat().st_size for p in folder.rglob("*")) / 2**30
    text = f"{folder}, {size:.1f} GiB, {shutil.disk_usage(nearest).free / 2**30:.0f} GiB free"
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        fix = "set FASTPOST_CACHE to a folder that can be written"
        return Finding("cache", "note", f"{text}; cannot be written: {error}", fix)
    return Finding("cache", "ok", text)
