"""An optimizer step of stock TRL, traced: its trainers' own loss functions on its own model.

A real trainer is made around a model of a few weights, so that every option is TRL's default; then
its `compute_loss` is called with the large model, whose tensors have no memory, and a batch as
TRL's collators make it. Left out on both sides: rollouts and what is logged of them.
"""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.scale.lengths import IGNORE_INDEX
from bench.scale.trl_model import make_policy, make_reference
from bench.scale.trl_tracer import StockTracer
from fastpost.demo.smollm2 import smollm2_path
from fastpost.planning.ledger import GRADIENTS, OPTIMIZER
from fastpost.planning.models import load_config
from fastpost.planning.optimizers import make_optimizer
from fastpost.planning.regions import follow_layers
from fastpost.planning.request import Request
from fastpost.planning.sharding import communication_named, pretended_processes
from fastpost.planning.trace import Traced

__all__ = ["trace_stock"]

Batch = dict[str, Tensor]
_MAX_NORM = 1.0  # `max_grad_norm` of transformers; its value costs nothing


def trace_stock(request: Request, batch: Batch, config: Any = None) -> Traced:
    """Two optimizer steps of stock TRL on a batch of `lengths.as_batch`; the second one counts.

    Weights and optimizer are TRL's: fp32 and fused AdamW, whatever the request says.
    """
    began = time.perf_counter()
    config = load_config(request.model) if config is None else config
    trainer = _trainer(request.method)
    tracer = StockTracer()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(pretended_processes(request.num_gpus))
        stack.enter_context(tracer.tracing())
        stack.enter_context(communication_named(tracer))
        model = make_policy(request, config, tracer)
        follow_layers(model, tracer)
        trainer.model = trainer.model_wrapped = model
        trainer.current_gradient_accumulation_steps = 1  # set by `train` alone
        if request.method == "dpo":
            is_second = request.adapter is None
            trainer.ref_model = make_reference(request, config, tracer) if is_second else None
        with unset_fake_temporarily():
            loss = _loss(request.method, trainer, batch)
        return _steps(request, model, loss, batch, tracer, began)


def _steps(
    request: Request,
    model: Any,
    loss: Callable[[Any], Tensor],
    batch: Batch,
    tracer: StockTracer,
    began: float,
) -> Traced:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", trained)
    start = tracer.ledger.now()
    for step in ("first step", "second step"):
        tracer.flops.clear()
        tracer.collectives.clear()
        with tracer.during(f"{step}, forward"):
            value = loss(model)
        with tracer.during(f"{step}, backward"):
            value.backward()
        del value
        for parameter in trained:
            if parameter.grad is not None:
                tracer.name(parameter.grad, GRADIENTS)
        flops, gathered = Counter(tracer.flops), Counter(tracer.collectives)
        with tracer.during(f"{step}, optimizer", OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(trained, _MAX_NORM)
            optimizer.step()
        optimizer.zero_grad()
    every = list(model.parameters())
    return Traced(
        request=request,
        windows=tracer.ledger.peaks(start),
        at_rest=tracer.ledger.held(),
        flops=dict(flops),
        gathered=dict(gathered),
        num_parameters=sum(p.numel() for p in every),
        num_trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.itemsize for p in trained),
        model_bytes=sum(p.numel() * p.itemsize for p in every),
        tokens=batch["input_ids"].numel(),
        fallbacks={},
        seconds=time.perf_counter() - began,
    )


def _loss(method: str, trainer: Any, batch: Batch) -> Callable[[Any], Tensor]:
    """The trainer's own loss of a batch, in the columns of its collator."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    answers = (labels != IGNORE_INDEX).long()
    if method == "sft":
        count = answers[:, 1:].sum()
        return lambda model: trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    if method == "dpo":
        columns = {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}
        return lambda model: trainer.compute_loss(model, dict(columns))
    left = int(answers.argmax(1).min())
    columns = {
        "prompt_ids": ids[:, :left],
        "prompt_mask": mask[:, :left],
        "completion_ids": ids[:, left:],
        "completion_mask": mask[:, left:],
        "advantages": torch.ones(len(ids)),
        "num_items_in_batch": answers.sum(),
    }
    return lambda model: trainer._compute_loss(model, dict(columns))


@functools.cache
def _trainer(method: str) -> Any:
    """A trainer of TRL with its default options, around a model of a few weights."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    row = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
    columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}
    name = method.upper()
    rest: dict[str, Any] = {}
    if method == "dpo":
        rest["ref_model"] = LlamaForCausalLM(config)
    if method == "grpo":
        rest["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    options = {"use_cpu": True, "bf16": True, "report_to": []}
    return getattr(trl, f"{name}Trainer")(
        LlamaForCausalLM(config),
        args=getattr(trl, f"{name}Config")(tempfile.mkdtemp(), **options),
        train_dataset=Dataset.from_list(
            [{key: row[key] for key in columns.get(method, ("prompt",))}] * 8
        ),
        processing_class=tokenizer,
        **rest,
    )
