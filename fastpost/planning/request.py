"""What is planned: model, method, GPUs, shape of a step."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastpost.planning.hardware import GPUS, Gpu

__all__ = ["ADAPTERS", "METHODS", "OPTIMIZERS", "PRECISIONS", "Adapter", "Request", "parse_gpus"]

METHODS = ("sft", "dpo", "grpo")
ADAPTERS = ("lora", "dora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit")
PRECISIONS = ("mixed", "bf16")


@dataclass(frozen=True)
class Adapter:
    """`kind` of ADAPTERS on all linear layers, of rank `rank`; qlora keeps weights in NF4."""

    kind: str
    rank: int

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """`lora:64` as an adapter; the rank is 16 if left out.

        Raises:
            ValueError: another kind, or a rank that is no positive integer.
        """
        kind, _, rank = text.partition(":")
        if kind not in ADAPTERS or not (rank or "16").isdecimal() or int(rank or 16) < 1:
            raise ValueError(
                f"adapter {text!r}: expected KIND:RANK such as lora:64, with KIND one of "
                f"{', '.join(ADAPTERS)}"
            )
        return cls(kind, int(rank or 16))

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}"


@dataclass(frozen=True)
class Request:
    """One configuration of a run.

    Attributes:
        model: as `models.load_config` takes it.
        method: of METHODS.
        gpu: the kind of GPU.
        num_gpus: processes, one on each; more than one shards with FSDP2.
        seq: tokens of a row: of SFT a full row, of DPO and GRPO prompt and answer.
        rows: rows a GPU computes at once; of DPO pairs, of GRPO completions.
        prompt: share of `seq` that is prompt, for DPO and GRPO.
        group: completions of one prompt, for GRPO.
        tokens_per_step: tokens of an optimizer step over all GPUs; None for one row batch each.
        adapter: None trains all weights.
        optimizer: of OPTIMIZERS.
        precision: "mixed" keeps trained weights in fp32 under bf16 autocast; "bf16" has no others.
        checkpointing: recompute each layer in the backward.
        memory_budget_gb: workspace of the head in GiB; None takes the kernels' default.

    Raises:
        ValueError: names the field, what was given and what is possible.
    """

    model: str
    method: str = "sft"
    gpu: Gpu = GPUS["H100-80GB"]
    num_gpus: int = 1
    seq: int = 8192
    rows: int = 1
    prompt: float = 0.5
    group: int = 8
    tokens_per_step: int | None = None
    adapter: Adapter | None = None
    optimizer: str = "adamw"
    precision: str = "mixed"
    checkpointing: bool = True
    memory_budget_gb: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected one of {', '.join(choices)}"
                )
        for name, least in (("seq", 16), ("rows", 1), ("num_gpus", 1), ("group", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected {least} or more")
        if not 0 < self.prompt < 1:
            raise ValueError(f"prompt {self.prompt}: expected a share between 0 and 1")
        at_once = self.num_gpus * self.row_tokens
        if self.tokens_per_step is not None and self.tokens_per_step % at_once:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step}: expected a multiple of {at_once}, what "
                f"{self.num_gpus} GPUs compute at once (rows of {self.seq} tokens)"
            )

    @property
    def row_tokens(self) -> int:
        """Tokens, padding apart, of the rows that a GPU computes at once."""
        return self.seq * self.rows * (2 if self.method == "dpo" else 1)

    @property
    def accumulation(self) -> int:
        """Batches of an optimizer step."""
        if self.tokens_per_step is None:
            return 1
        return self.tokens_per_step // (self.num_gpus * self.row_tokens)


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """`8xH100-80GB` as (8, the GPU); `H100-80GB` is one, and any NAME-NGB has N decimal GB.

    Raises:
        ValueError: not of this form, or a GPU without known figures.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([A-Za-z0-9]+-\d+GB)", text)
    if match is None or match[1] == "0" or match[2] not in GPUS:
        raise ValueError(
            f"gpus {text!r}: expected COUNTxNAME such as 8xH100-80GB, with NAME one of "
            f"{', '.join(GPUS)}; give --gpu-memory-gb, --tflops, --bandwidth to change its figures"
        )
    return int(match[1] or 1), GPUS[match[2]]
