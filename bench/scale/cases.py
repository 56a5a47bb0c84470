"""What is compared: models, methods, adapters, GPUs and the batch of a step.

    full     8 x 80 GB, FSDP2. Ours: bf16 weights and 8-bit AdamW; TRL: fp32 weights, fused AdamW
    LoRA     8 x 80 GB, FSDP2, rank 64 on all linear layers; frozen weights bf16, adapters fp32
    QLoRA    one 80 GB GPU, rank 32 on all linear layers; NF4 quantised doubly. Ours: 8-bit AdamW

Both sides recompute every layer. A step is one batch a GPU, of the lengths in `lengths`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.scale.lengths import Row, preference_rows
from fastpost.planning.request import Adapter, Request

__all__ = ["ADAPTERS", "METHODS", "MODELS", "Case", "every_case"]

MODELS = {
    "8B": "meta-llama/Llama-3.1-8B",
    "32B": "Qwen/Qwen3-32B",
    "70B": "meta-llama/Llama-3.3-70B-Instruct",
}
METHODS = {"sft": (8, 1), "dpo": (4, 2), "grpo": (1, 8)}  # prompts, answers of each, a GPU
ADAPTERS = {"full": None, "LoRA": Adapter("lora", 64), "QLoRA": Adapter("qlora", 32)}


@dataclass(frozen=True)
class Case:
    """One row of the table; names are keys of the tables above."""

    model: str
    method: str
    adapter: str

    def __str__(self) -> str:
        return f"{self.model} {self.method} {self.adapter}"

    def request(self, seq: int = 1024, *, offload: bool = False) -> Request:
        """Ours; what stock TRL takes of it are model, method, GPUs, adapter and checkpointing."""
        is_lora = self.adapter == "LoRA"
        return Request(
            MODELS[self.model],
            self.method,
            num_gpus=1 if self.adapter == "QLoRA" else 8,
            seq=seq,
            rows=METHODS[self.method][0] if self.method != "grpo" else METHODS["grpo"][1],
            adapter=ADAPTERS[self.adapter],
            optimizer="adamw" if is_lora else "adamw_8bit",
            precision="bf16" if self.adapter == "full" else "mixed",
            offload=offload,
        )

    def rows(self) -> list[Row]:
        """The sequences of a step of one GPU."""
        return preference_rows(self.method, *METHODS[self.method])


def every_case() -> list[Case]:
    """All of them, small models first."""
    return [
        Case(model, method, adapter)
        for model in MODELS
        for method in METHODS
        for adapter in ADAPTERS
    ]
