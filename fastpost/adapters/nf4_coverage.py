"""How much of a model is 4-bit, by kind of module: what a loader left out is seen, not guessed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastpost.adapters.nf4_layer import Nf4Linear

__all__ = ["Coverage", "KindCoverage", "coverage_of"]


class KindCoverage(NamedTuple):
    """Modules of one name, such as q_proj."""

    kind: str
    modules: int
    weights: int  # elements
    quantized: int  # of those, elements held in 4 bits
    num_bytes: int


class Coverage(NamedTuple):
    """By kind, largest first. Biases count as weights; matrices of adapters do not."""

    kinds: tuple[KindCoverage, ...]
    experts: tuple[str, ...]  # parameters with an axis of experts, which stay as they are

    @property
    def weights(self) -> int:
        return sum(kind.weights for kind in self.kinds)

    @property
    def fraction(self) -> float:
        """Of all weights, the share held in 4 bits."""
        return sum(kind.quantized for kind in self.kinds) / max(self.weights, 1)

    @property
    def num_bytes(self) -> int:
        return sum(kind.num_bytes for kind in self.kinds)

    def __str__(self) -> str:
        lines = [
            f"{self.fraction:.1%} of {self.weights:,} weights quantised, "
            f"{self.num_bytes / 2**20:,.1f} MiB"
        ]
        width = max((len(kind.kind) for kind in self.kinds), default=0)
        for kind in self.kinds:
            share = kind.quantized / max(kind.weights, 1)
            lines.append(
                f"  {kind.kind:<{width}}  {kind.modules:>5} x  {kind.weights:>16,}  {share:>6.1%}"
            )
        if self.experts:
            lines.append(
                f"  not quantised: {len(self.experts)} parameters of experts, first "
                f"{self.experts[0]}"
            )
        return "\n".join(lines)


def coverage_of(model: nn.Module) -> Coverage:
    """What of `model` is 4-bit; tied weights count once, with or without adapters around it."""
    seen: set[int] = set()
    sums: dict[str, list[int]] = {}
    experts = []
    for path, module in model.named_modules():
        steps = [step for step in path.split(".") if step != "base_layer" and not step.isdigit()]
        if any(step.startswith("lora_") for step in steps):
            continue
        first = True
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = steps[-1] if steps else ""
            if name not in ("weight", "bias", "packed"):
                kind = f"{kind}.{name}"
            if parameter.dim() == 3 and "experts" in steps:
                experts.append(f"{path}.{name}")
            is_packed = isinstance(module, Nf4Linear) and name == "packed"
            count, num_bytes = parameter.numel(), parameter.numel() * parameter.itemsize
            if is_packed:
                count = module.in_features * module.out_features
                num_bytes += sum(b.numel() * b.itemsize for b in module.buffers(recurse=False))
            total = sums.setdefault(kind, [0, 0, 0, 0])
            changes = (int(first), count, count if is_packed else 0, num_bytes)
            sums[kind] = [value + change for value, change in zip(total, changes, strict=True)]
            first = False
    kinds = [KindCoverage(kind, *values) for kind, values in sums.items()]
    return Coverage(tuple(sorted(kinds, key=lambda k: -k.weights)), tuple(experts))
