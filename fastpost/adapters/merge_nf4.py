"""An adapter merged into 4-bit weights, shard by shard, with the error of rounding stated.

    M = merged(W)   W is the weight that the adapter saw: the base's own, or what 4 bits leave of it
    Q(M)            what is written, as bitsandbytes writes it

Rounding to 4 bits moves a weight by about a tenth of its size, an adapter by much less. So what
came of the adapter is measured, by kind of layer, with D = M - W and W4 the base in 4 bits:

    weight error   ||Q(M) - M|| / ||M||
    delta error    ||Q(M) - W4 - D|| / ||D||   0: all of it is there; 1: as far off as without
    delta kept     <Q(M) - W4, D> / ||D||^2    1: all of it along its own direction

Onto a base that lies on the 4-bit grid already, changes below half a step of the grid round back to
nothing; from the 16-bit weight they move some elements by a whole step, right on average and noisy.
The verdict is the KL between adapter and merged model on given texts, as for `merge_adapter`; the
same KL without the adapter tells whether the merge is of any use.

Format: `nf4_state`; equations of the merge: `merge`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpost.adapters.load_nf4 import KEPT_MODULES, load_nf4
from fastpost.adapters.merge import (
    BASES,
    Delta,
    check_known,
    log_probs,
    merged_weight,
    read_deltas,
    token_kls,
)
from fastpost.adapters.nf4_state import QUANT_STATE, pack_state, unpack_state
from fastpost.adapters.weight_files import WeightFolder, release_freed, staged, write_several
from fastpost_kernels import Nf4Weight, nf4_dequantize, nf4_quantize

__all__ = ["KindError", "Nf4MergeReport", "merge_adapter_nf4"]


class KindError(NamedTuple):
    """Adapted layers of one name, such as q_proj, taken together; see the module's docstring."""

    kind: str
    layers: int
    weight_error: float
    delta_error: float
    delta_kept: float


class Nf4MergeReport(NamedTuple):
    """What was merged, what 4 bits left of it, and how far that is from base and adapter."""

    layers: int
    kinds: tuple[KindError, ...]  # of layers in 4 bits
    mean_kl: float  # nats a token, of (base with adapter) from merged
    max_kl: float
    unadapted_kl: float  # mean, of (base with adapter) from the base alone

    def __str__(self) -> str:
        lines = [
            f"merged {self.layers} layers into NF4; KL from the adapter {self.mean_kl:.2e} nats a "
            f"token, at most {self.max_kl:.2e} (without the adapter {self.unadapted_kl:.2e})"
        ]
        width = max((len(kind.kind) for kind in self.kinds), default=0)
        for kind in self.kinds:
            lines.append(
                f"  {kind.kind:<{width}}  {kind.layers:>4} x  weight error {kind.weight_error:.3f}"
                f"  delta error {kind.delta_error:.2f}  delta kept {kind.delta_kept:.2f}"
            )
        return "\n".join(lines)


class _Sums:
    """Squares and products over the layers of one kind."""

    def __init__(self) -> None:
        self.layers = 0
        self.merged = self.delta = self.lost = self.delta_lost = self.product = 0.0

    def add(self, merged: Tensor, rounded: Tensor, delta: Tensor, moved: Tensor) -> None:
        """M, Q(M), D and Q(M) - W4; the first and the last are overwritten, to save memory."""
        self.layers += 1
        self.merged += _square(merged)
        self.delta += _square(delta)
        self.product += float((moved * delta).sum(dtype=torch.float64))
        self.lost += _square(merged.sub_(rounded))
        self.delta_lost += _square(moved.sub_(delta))

    def error(self, kind: str) -> KindError:
        merged, delta = max(self.merged, 1e-300), max(self.delta, 1e-300)
        return KindError(
            kind,
            self.layers,
            (self.lost / merged) ** 0.5,
            (self.delta_lost / delta) ** 0.5,
            self.product / delta,
        )


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def merge_adapter_nf4(
    base_folder: str | Path,
    adapter_folder: str | Path,
    output: str | Path,
    *,
    prompts: Sequence[str],
    base: str = "original",
    max_kl: float = 0.01,
) -> Nf4MergeReport:
    """Write `base_folder` with the adapter merged, in 4-bit NormalFloat, into `output`.

    `load_nf4` reads it, and transformers with bitsandbytes. Linear layers that `load_nf4` would
    quantise are quantised, adapted or not; adapted ones that stay in 16 bits are merged there.

    Args:
        base_folder: safetensors of the model that the adapter was trained on, in 16 bits, or in
            NF4 by bitsandbytes or fastpost: then the files keep their block size and layers
            without an adapter keep their bytes.
        adapter_folder: a LoRA or DoRA adapter as PEFT saves it.
        output: a new folder; nothing is left there if the merge is refused.
        prompts: texts on which merged model and adapter are compared.
        base: what the adapter was trained on: "original", the weights as the folder has them, or
            "nf4", the same in 4 bits. A folder in NF4 is both.
        max_kl: mean KL in nats a token above which the merge is refused.

    Raises:
        ValueError: as `merge_adapter`; no linear layer to quantise.
    """
    if base not in BASES:
        raise ValueError(f"base must be one of {BASES}, got {base!r}")
    if not prompts:
        raise ValueError("prompts is empty: the merged model is compared on at least one text")
    weights, deltas = WeightFolder(base_folder), read_deltas(adapter_folder)
    check_known(deltas, weights, adapter_folder)
    config = AutoConfig.from_pretrained(base_folder)
    is_packed = any(name.endswith(QUANT_STATE) for name in weights.shard_of)
    dtype = config.dtype or torch.float32
    with staged(output) as folder:
        writer = Writer(weights, deltas, config, dtype, is_packed or base == "nf4")
        write_several(weights, folder, writer.made)
        if not is_packed:
            _write_config(folder, writer, dtype)
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        adapted: Any = (
            load_nf4(base_folder, dtype=dtype, device="cpu")
            if is_packed or base == "nf4"
            else AutoModelForCausalLM.from_pretrained(base_folder)
        )
        adapted = PeftModel.from_pretrained(adapted, str(adapter_folder))
        before = log_probs(adapted, tokenizer, prompts)
        with adapted.disable_adapter():
            unadapted = token_kls(before, log_probs(adapted, tokenizer, prompts))
        del adapted  # one model is in memory at a time
        after = log_probs(load_nf4(folder, dtype=dtype, device="cpu"), tokenizer, prompts)
        found = token_kls(before, after)
        kls = (float(found.mean()), float(found.max()), float(unadapted.mean()))
        report = Nf4MergeReport(len(deltas), writer.errors(), *kls)
        if not report.mean_kl <= max_kl:
            raise ValueError(
                f"{report}\nis above {max_kl}: 4 bits lose too much of it. Merge into 16 bits, "
                "keep the adapter beside the model, or raise the limit if that is good enough"
            )
    return report


class Writer:
    """Makes the tensors of the output, one weight of the base after the other."""

    def __init__(
        self,
        weights: WeightFolder,
        deltas: dict[str, Delta],
        config: Any,
        dtype: torch.dtype,
        onto_nf4: bool,
    ) -> None:
        self.weights, self.deltas, self.dtype, self.onto_nf4 = weights, deltas, dtype, onto_nf4
        ending = "." + QUANT_STATE
        self.packed = {n.removesuffix(ending) for n in weights.shard_of if n.endswith(ending)}
        linear = self.packed or _linear_weights(config)
        kept = {name for name in linear if set(name.split(".")) & set(KEPT_MODULES)}
        self.chosen = self.packed or (linear - kept) & set(weights.shard_of)
        self.skipped = sorted(name.removesuffix(".weight") for name in linear - self.chosen)
        if not self.chosen:
            raise ValueError(
                f"{weights.folder} has no linear layer outside of {KEPT_MODULES}: nothing of it "
                "would be quantised; merge into 16 bits"
            )
        self._sums: dict[str, _Sums] = {}

    def made(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is written in place of a tensor of the base."""
        if _prefixes(name) & self.packed:
            return {}  # absmax and the like are written with their weight
        delta = self.deltas.get(name)
        if name not in self.chosen:
            return {name: tensor if delta is None else merged_weight(name, tensor, delta)}
        found = self._in_nf4(name, tensor)
        if delta is not None:
            found = self._merged(name, tensor, found, delta)
        release_freed()
        state = pack_state(found, self.dtype)
        return {name: found.packed} | {f"{name}.{key}": part for key, part in state.items()}

    def errors(self) -> tuple[KindError, ...]:
        """By kind, in the order of the files."""
        return tuple(sums.error(kind) for kind, sums in self._sums.items())

    def _in_nf4(self, name: str, tensor: Tensor) -> Nf4Weight:
        if name in self.packed:
            return unpack_state(name, tensor, self.weights.read)
        return nf4_quantize(tensor)

    def _merged(self, name: str, tensor: Tensor, four_bit: Nf4Weight, delta: Delta) -> Nf4Weight:
        moved = nf4_dequantize(four_bit, torch.float32).neg_()  # becomes Q(M) - W4
        seen = moved.neg() if self.onto_nf4 else tensor.float()
        merged = merged_weight(name, seen, delta)
        found = nf4_quantize(
            merged,
            block_size=four_bit.block_size,
            double_quant=four_bit.nested_absmax is not None,
            storage=four_bit.packed.dtype,
        )
        rounded = nf4_dequantize(found, torch.float32)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        sums = self._sums.setdefault(kind, _Sums())
        sums.add(merged, rounded, merged - seen, moved.add_(rounded))
        return found


def _prefixes(name: str) -> set[str]:
    """Names of weights that `name` may be a companion of."""
    steps = name.split(".")
    return {".".join(steps[:end]) for end in range(1, len(steps))}


def _linear_weights(config: Any) -> set[str]:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if type(module) is nn.Linear}


def _write_config(folder: Path, writer: Writer, dtype: torch.dtype) -> None:
    """Tells transformers that the weights are bitsandbytes' in NF4."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": writer.skipped,
    }
    path.write_text(json.dumps(config, indent=2) + "\n")
