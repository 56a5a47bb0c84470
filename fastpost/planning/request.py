"""What is planned: model, method, GPUs, shape of a step."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastpost.planning.hardware import GPUS, Gpu

__all__ = [
    "ADAPTERS",
    "METHODS",
    "NOT_PLANNED",
    "OPTIMIZERS",
    "PRECISIONS",
    "ROLLOUT_DTYPES",
    "Adapter",
    "Request",
    "parse_gpus",
]

METHODS = ("sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo")
# Trained here, and not planned: why.
NOT_PLANNED = {
    "ppo": "it trains a value model beside the policy; plan rloo, which samples as it does",
    "online_dpo": "it samples and judges pairs; plan grpo with a group of 2 for its sampling",
    "prm": "it scores steps of solutions; plan reward, whose model and rows are the same",
}
ADAPTERS = ("lora", "dora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit")
PRECISIONS = ("mixed", "bf16", "fp32")
ROLLOUT_DTYPES = ("bfloat16", "float16", "float32")

_SAMPLING = {"grpo": 0.0, "rloo": 0.05}  # weight of the reference unless told otherwise
_PAIRS = ("dpo", "orpo", "cpo", "simpo", "reward")


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
        seq: tokens of a row: of SFT a full row, of other methods prompt and answer.
        rows: rows a GPU computes at once; of methods of pairs pairs, of GRPO completions.
        prompt: share of `seq` that is prompt, for all but SFT.
        group: completions of one prompt, for GRPO and RLOO.
        beta: weight of the reference for GRPO and RLOO; None takes the trainer's (0 and 0.05).
        rollout_dtype: of a copy to sample from, for GRPO and RLOO; None samples from the model.
        tokens_per_step: tokens of an optimizer step over all GPUs; None for one row batch each.
        adapter: None trains all weights.
        optimizer: of OPTIMIZERS.
        optimizer_in_backward: update each layer in the backward; no clipping then.
        precision: "mixed" keeps trained weights in fp32 under bf16 autocast; "bf16" has no others,
            adapters apart; "fp32" computes in fp32.
        checkpointing: recompute each layer in the backward.
        offload: what checkpointing keeps waits in host memory.
        mlp_tile_tokens: of an MLP computed at a time; None computes all at once.
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
    beta: float | None = None
    rollout_dtype: str | None = None
    offload: bool = False
    optimizer_in_backward: bool = False
    mlp_tile_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.method in NOT_PLANNED:
            raise ValueError(f"method {self.method} is not planned: {NOT_PLANNED[self.method]}")
        for name, choices in (
            ("method", METHODS),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("rollout_dtype", (None, *ROLLOUT_DTYPES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected one of "
                    f"{', '.join(str(choice) for choice in choices)}"
                )
        for name, least in (("seq", 16), ("rows", 1), ("num_gpus", 1), ("group", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected {least} or more")
        if not 0 < self.prompt < 1:
            raise ValueError(f"prompt {self.prompt}: expected a share between 0 and 1")
        self._check_sampling()
        self._check_memory()
        at_once = self.num_gpus * self.row_tokens
        if self.tokens_per_step is not None and self.tokens_per_step % at_once:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step}: expected a multiple of {at_once}, what "
                f"{self.num_gpus} GPUs compute at once (rows of {self.seq} tokens)"
            )

    def _check_sampling(self) -> None:
        if not self.samples and (self.beta is not None or self.rollout_dtype is not None):
            raise ValueError(
                f"beta and rollout_dtype are of {', '.join(_SAMPLING)}; {self.method} has neither "
                "(its reference does not depend on a weight, and it samples nothing)"
            )
        if self.beta is not None and self.beta < 0:
            raise ValueError(f"beta {self.beta}: expected 0 or more")
        if self.rollout_dtype and self.adapter and self.adapter.kind == "qlora":
            raise ValueError(
                "rollout_dtype makes a copy of 16 bits or more, which the trainer refuses for a "
                "model in 4 bits: leave it out"
            )

    def _check_memory(self) -> None:
        if self.mlp_tile_tokens is not None and self.mlp_tile_tokens < 1:
            raise ValueError(f"mlp_tile_tokens {self.mlp_tile_tokens}: expected 1 or more")
        if self.offload and not self.checkpointing:
            raise ValueError("offload moves what checkpointing keeps: it needs checkpointing true")
        if self.optimizer_in_backward and self.accumulation > 1:
            raise ValueError(
                "optimizer_in_backward takes one batch a step, not "
                f"{self.accumulation}: leave tokens_per_step out, or set it to one batch"
            )

    @property
    def has_wide_weights(self) -> bool:
        """Whether the model is loaded in fp32."""
        is_mixed = self.precision == "mixed" and self.adapter is None
        return is_mixed or self.precision == "fp32"

    @property
    def samples(self) -> bool:
        """Whether the method learns from completions that it samples."""
        return self.method in _SAMPLING

    @property
    def has_reference(self) -> bool:
        """Whether the method compares with a reference."""
        if self.samples:
            return (_SAMPLING[self.method] if self.beta is None else self.beta) > 0
        return self.method in ("dpo", "kto")

    @property
    def is_pairs(self) -> bool:
        """Whether a row is a pair of answers to one prompt."""
        return self.method in _PAIRS

    @property
    def num_prompt(self) -> int:
        """Tokens of a row that are prompt."""
        return 0 if self.method == "sft" else int(self.seq * self.prompt)

    @property
    def row_tokens(self) -> int:
        """Tokens, padding apart, of the rows that a GPU computes at once."""
        return self.seq * self.rows * (2 if self.is_pairs else 1)

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
