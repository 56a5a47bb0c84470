"""Figures of GPUs that predictions of time rest on. Every one is printed with a plan.

`tflops` and `bandwidth` are the vendors' dense bf16 and memory figures; what part of them a run
reaches is assumed (`roofline.Assumptions`), not measured. `memory` is what a process can allocate:
the nominal GiB, less a reserve for CUDA's context, NCCL and fragmentation that plans subtract
(`Gpu.reserve`). `link` is bytes per second one GPU sends to the others of its machine.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPUS", "Gpu"]

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as in `--gpus`.
        memory: bytes in all.
        reserve: bytes that tensors cannot have.
        tflops: 10^12 dense bf16 operations per second.
        bandwidth: 10^9 bytes per second of its memory.
        link: 10^9 bytes per second to the other GPUs, one direction.
        price: dollars an hour; an assumption, to be replaced by yours.
    """

    name: str
    memory: int
    reserve: int
    tflops: float
    bandwidth: float
    link: float
    price: float

    @property
    def usable(self) -> int:
        """Bytes that tensors may have."""
        return self.memory - self.reserve


def _gpu(
    name: str, memory_gib: float, tflops: float, bandwidth: float, link: float, price: float
) -> Gpu:
    return Gpu(name, int(memory_gib * GIB), 3 * GIB, tflops, bandwidth, link, price)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40GB", 39.4, 312, 1555, 300, 1.5),
        _gpu("A100-80GB", 79.1, 312, 2039, 300, 2.0),
        _gpu("H100-80GB", 79.1, 989, 3350, 450, 3.0),
        _gpu("H200-141GB", 139.8, 989, 4800, 450, 4.0),
        _gpu("B200-180GB", 178.0, 2250, 8000, 900, 6.0),
        _gpu("L40S-48GB", 44.4, 362, 864, 32, 1.0),
        _gpu("RTX4090-24GB", 23.5, 165, 1008, 32, 0.5),
    )
}
