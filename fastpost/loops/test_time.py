"""Test-time training: adapt to a user's first examples, answer, be as before (Sun 2020,
arXiv 1909.13231; for language models and few examples Akyürek 2024, arXiv 2411.07279).

    with adapted(model, tokenizer, examples, steps=8) as chat_ready:
        chat_ready.generate(...)
    # `model` is bit for bit what it was

A LoRA adapter is trained on the examples by `SFTTrainer`; the weights themselves are frozen and
never written. When the block ends, also by an exception, the adapter is gone and every module has
its class, attributes, hooks, mode and parameters back, and every parameter its storage, gradient
and `requires_grad`. Training draws its random numbers apart: the caller's go on as if there had
been none. An example is a row `{"prompt": [messages], "completion": "4"}`.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastpost.data.rows import Row, read_rows
from fastpost.loops.candidates import answer, sft_row
from fastpost.loops.run import Fields, prompt_rows
from fastpost.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["adapted"]

# Trained once and thrown away: nothing is saved, logged or shown.
_QUIET = {
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


@contextmanager
def adapted(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Any,
    *,
    steps: int = 8,
    learning_rate: float = 1e-3,
    rank: int = 8,
    sft: Fields | None = None,
) -> Iterator[PeftModel]:
    """The model adapted to `examples`, in evaluation mode, for the length of a block.

    Args:
        model: a causal language model in memory, without an adapter.
        tokenizer: its tokenizer.
        examples: rows, see above, in any form `fastpost.data` reads.
        steps: of AdamW, each on all examples.
        learning_rate: constant.
        rank: of LoRA on every linear layer, alpha twice that.
        sft: further fields of `SFTConfig`.

    Raises:
        ValueError: a model with an adapter, an option out of range, a field that is set above.
        DataError: malformed examples.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"test-time training adapts a plain model, got {type(model).__name__}; merge its "
            "adapter first, or pass what get_base_model() gives"
        )
    if steps < 1 or rank < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps={steps}, rank={rank}, learning_rate={learning_rate}; give at least 1, 1 and "
            "more than 0"
        )
    rows = prompt_rows(list(read_rows(examples)), "examples", "completion")
    fields: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": len(rows),
        "lr_scheduler_type": "constant",
        "use_cpu": model.device.type == "cpu",
        **_QUIET,
    }
    taken = sorted(fields.keys() & (sft or {}).keys() | {"output_dir"} & (sft or {}).keys())
    if taken:
        raise ValueError(f"sft sets {', '.join(taken)}, which this context manager sets itself")
    restore = _remember(model)
    try:
        with tempfile.TemporaryDirectory() as folder, _own_random_state():
            adapted_model = _train(model, tokenizer, rows, rank, {**fields, **(sft or {})}, folder)
        yield adapted_model.eval()
    finally:
        restore()


def _train(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Row],
    rank: int,
    fields: dict[str, Any],
    folder: str,
) -> PeftModel:
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=folder, **fields),
        train_dataset=Dataset.from_list(
            [sft_row(row["prompt"], answer(row, "completion")) for row in rows]
        ),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.engine.remove()
    return trained


def _remember(model: nn.Module) -> Callable[[], None]:
    """A function that makes the module tree what it is now. No weight is copied."""
    modules = [(module, type(module), _shallow(module.__dict__)) for module in model.modules()]
    tensors = [
        (tensor, tensor.data, tensor.requires_grad, tensor.grad)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    configs = [
        (held, copy.deepcopy(held.__dict__))
        for held in (getattr(model, "config", None), getattr(model, "generation_config", None))
        if held is not None
    ]

    def restore() -> None:
        for module, kind, attributes in modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(_shallow(attributes))
        for tensor, data, requires_grad, gradient in tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient
        for held, attributes in configs:
            held.__dict__.clear()
            held.__dict__.update(attributes)

    return restore


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a module, its own dictionaries of children and hooks copied."""
    return {
        name: copy.copy(value) if isinstance(value, dict | set) else value
        for name, value in attributes.items()
    }


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Random states of the caller, put back at the end: a trainer sets them all."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
