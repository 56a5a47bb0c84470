"""The GPUs compiled for: what one of their multiprocessors holds, and what that leaves of a kernel.

Limits are those of the CUDA C++ programming guide's table of compute capabilities, of the tensor
memory in NVIDIA's PTX manual (512 columns), and of the CDNA3 instruction set guide (a compute unit:
four SIMDs with 512 vector registers of 64 lanes and 8 waves each, 64 KiB of local memory).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

__all__ = ["H100_BANDWIDTH", "H100_FLOPS", "PROCESSORS", "Occupancy", "Processor", "predict"]

KIB = 1024
# What an H100 SXM really gives: dense bf16 products and reads of its memory, per second. The data
# sheet says 989 TFLOP/s and 3.35 TB/s.
H100_FLOPS = 750e12
H100_BANDWIDTH = 3.0e12


class Occupancy(NamedTuple):
    """Thread blocks that fit in one multiprocessor at a time."""

    blocks: int
    share: float  # of the warps that it can hold
    limit: str  # what is used up first


class Processor(NamedTuple):
    """One multiprocessor (NVIDIA) or compute unit (AMD), which has four schedulers."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    warps: int
    blocks: int
    registers: int  # 32 bits, one thread's
    register_unit: int  # registers of a warp come in multiples of this
    shared: int  # bytes
    shared_per_block: int
    shared_reserved: int  # per block, by the driver
    tensor_memory: int  # columns

    @property
    def capability(self) -> int:
        """The number that our launchers choose tiles by: 90 for 9.0, -1 for AMD."""
        return self.arch if isinstance(self.arch, int) else -1

    def target(self) -> Any:
        """Triton's name for it."""
        from triton.backends.compiler import GPUTarget  # heavy

        return GPUTarget(self.backend, self.arch, self.warp_size)

    def occupancy(
        self, warps: int, registers: int, shared: int, tensor_memory: int = 0
    ) -> Occupancy:
        """For blocks of `warps` that take `registers` a thread and `shared` bytes a block.

        Zero blocks if one alone does not fit, which is what a launch would fail with.
        """
        unit = self.register_unit
        per_warp = math.ceil(max(registers, 1) * self.warp_size / unit) * unit
        resident = 4 * (self.registers // 4 // per_warp)
        fits = shared <= self.shared_per_block
        limits = {
            "warps": min(self.warps // warps, self.blocks),
            "registers": resident // warps,
            "shared memory": self.shared // max(1, shared + self.shared_reserved) * fits,
        }
        if tensor_memory:
            limits["tensor memory"] = self.tensor_memory // tensor_memory
        limit = min(limits, key=lambda name: limits[name])
        return Occupancy(limits[limit], limits[limit] * warps / self.warps, limit)


PROCESSORS = {
    processor.name: processor
    for processor in (
        Processor("sm_80", "cuda", 80, 32, 64, 32, 65536, 256, 164 * KIB, 163 * KIB, KIB, 0),
        Processor("sm_90", "cuda", 90, 32, 64, 32, 65536, 256, 228 * KIB, 227 * KIB, KIB, 0),
        Processor("sm_100", "cuda", 100, 32, 64, 32, 65536, 256, 228 * KIB, 227 * KIB, KIB, 512),
        Processor("gfx942", "hip", "gfx942", 64, 32, 32, 131072, 512, 64 * KIB, 64 * KIB, 0, 0),
    )
}


def predict(flops: int, moved: int) -> tuple[float, str]:
    """A prediction, not a measurement: microseconds on an H100 by the roofline, and what bounds it.

    The slower of `flops` at 750 TFLOP/s and `moved` bytes at 3.0 TB/s, as if both overlapped, the
    launch were free and every block of a partly filled wave ran at full speed.
    """
    times = {"tensor cores": flops / H100_FLOPS, "memory": moved / H100_BANDWIDTH}
    bound = max(times, key=lambda name: times[name])
    return 1e6 * times[bound], bound
