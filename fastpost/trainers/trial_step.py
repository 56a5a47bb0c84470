"""Real steps on the worst batch before training begins: predicted peak beside the measured one.

    kept       trained weights, buffers, optimizer state (to host memory), random states, counters
    steps      forward, backward, clipping and optimizer, on the batch of `trial_batch`: the first
               makes the optimizer's states, the second is like all that follow
    put back   all of it, bit for bit; gradients are freed

A run that does not fit fails here, not after hours at its longest row. On a GPU the peak is the
allocator's; on a CPU what is held plus what PyTorch's profiler sees allocated. With accumulation
two batches run, as the second meets the gradients of the first. Sampling is apart: a rollout is not
run, though its copy of the weights (`rollout_dtype`) is made.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from fastpost.trainers.trial_batch import TRIED, Shape, worst_inputs, worst_shape
from fastpost.trainers.trial_plan import predicted_bytes
from fastpost_kernels._kept_buffer import release_kept_buffers

__all__ = ["Trial", "TrialStep", "refuse_trial"]

GIB = 2**30
# What a loss of TRL's or ours writes into the trainer.
_WRITTEN = ("_metrics", "_total_train_tokens", "first_step", "_scored_logps", "entropy_coef")


@dataclass(frozen=True)
class Trial:
    """What the trial step found.

    Attributes:
        rows: of the worst batch: of DPO and reward models pairs.
        seq: tokens of each.
        predicted: bytes of the peak, None where the planner has no such configuration.
        reason: why not.
        measured: bytes of the peak.
    """

    rows: int
    seq: int
    predicted: int | None
    reason: str
    measured: int

    def __str__(self) -> str:
        said = f"not predicted ({self.reason})"
        if self.predicted is not None:
            said = f"predicted {self.predicted / GIB:.2f}"
        return (
            f"trial step on the worst batch, {self.rows} x {self.seq:,} tokens: {said}, "
            f"measured {self.measured / GIB:.2f} GiB"
        )


class TrialStep(TrainerCallback):
    """Runs the trial as training begins.

    Attributes:
        found: the trial, None before it.
    """

    def __init__(self, trainer: Any, log: Any) -> None:
        self._trainer, self._log = trainer, log
        self.found: Trial | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        method = _method_of(trainer)
        shape = worst_shape(trainer, method)
        with _put_back(trainer):
            predicted, reason = None, "the main process does"
            if args.process_index == 0:
                predicted, reason = predicted_bytes(trainer, method, shape)
            trainer.accelerator.wait_for_everyone()
            try:
                measured = _measure(trainer, method, shape)
            except torch.OutOfMemoryError as error:
                said = reason if predicted is None else f"{predicted / GIB:.2f} GiB were predicted"
                error.add_note(f"in the trial step, before any data was trained on; {said}")
                raise
        rows = args.per_device_train_batch_size
        self.found = Trial(rows, shape.seq, predicted, reason, measured)
        if args.process_index == 0:
            self._log.warning("%s", self.found)


def refuse_trial(trainer: Any) -> None:
    """Refuse, at construction, a trial of what has no worst batch here.

    Raises:
        ValueError: names the method, the data or the option.
    """
    if not any(isinstance(trainer, cls) for cls in TRIED):
        raise ValueError(
            f"trial_step=True knows the worst batch of {', '.join(TRIED.values())}, not of "
            f"{type(trainer).__name__}; set it to False"
        )
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(
            "trial_step=True looks for the longest row, which a streamed data set does not tell; "
            "set it to False"
        )
    if trainer.args.fp16:
        raise ValueError(
            "trial_step=True would leave a loss scale of fp16 behind; use bf16, or set it to False"
        )


def _method_of(trainer: Any) -> str:
    return next(name for cls, name in TRIED.items() if isinstance(trainer, cls))


def _measure(trainer: Any, method: str, shape: Shape) -> int:
    """Peak bytes of tensors during two steps."""
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _steps(trainer, method, shape)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(peak)
    release_kept_buffers()
    held = _held_bytes(trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _steps(trainer, method, shape)
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return held + most


def _steps(trainer: Any, method: str, shape: Shape) -> None:
    trainer.model_wrapped.train()
    inputs = worst_inputs(trainer, method, shape)
    copied = getattr(getattr(trainer, "rollout", None), "copy", None)
    if copied is not None:
        with trainer._lend_model() as lent:
            copied.refresh(lent)
    for _ in range(2):
        _step(trainer, method, inputs)


def _step(trainer: Any, method: str, inputs: dict[str, Any]) -> None:
    args, model, optimizer = trainer.args, trainer.model_wrapped, _optimizer(trainer)
    options = {}
    if method == "sft":
        options["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    for _ in range(min(args.gradient_accumulation_steps, 2)):
        _score_beforehand(trainer, method, inputs)
        if args.optimizer_in_backward:
            trainer._begin_backward_step()
        loss = trainer.compute_loss(model, dict(inputs), **options)
        trainer.accelerator.backward(loss)
        del loss
    if args.max_grad_norm and not args.optimizer_in_backward:
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _score_beforehand(trainer: Any, method: str, inputs: dict[str, Any]) -> None:
    """The passes without gradients that TRL runs over completions when it has sampled them."""
    if method not in ("grpo", "rloo"):
        return
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask, width = torch.ones_like(ids), inputs["completion_ids"].shape[1]
    with torch.no_grad():
        if method == "rloo":
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
        if trainer.beta == 0.0:
            return
        policy = trainer.accelerator.unwrap_model(trainer.model)
        is_off = trainer.ref_model is None and isinstance(policy, PeftModel)
        with policy.disable_adapter() if is_off else nullcontext():
            model = trainer.model if trainer.ref_model is None else trainer.ref_model
            trainer._get_per_token_logps_and_entropies(model, ids, mask, width)


@contextmanager
def _put_back(trainer: Any) -> Iterator[None]:
    """Within, a step may be taken; afterwards all is as before, bit for bit."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    changing = [t for t in tensors if t.requires_grad or not isinstance(t, torch.nn.Parameter)]
    kept = [(tensor, _local(tensor).detach().to("cpu", copy=True)) for tensor in changing]
    optimizer = _optimizer(trainer)
    states = {
        parameter: {name: _kept_value(value) for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }
    written = {
        name: copy.deepcopy(vars(trainer)[name]) for name in _WRITTEN if name in vars(trainer)
    }
    engines = [e for e in (trainer.engine, trainer.ref_engine) if e is not None]
    counts = [(copy.copy(e.stats), e.fallbacks.copy()) for e in engines]
    steps = vars(trainer).get("current_gradient_accumulation_steps")
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    was_training = trainer.model.training
    random_states = _random_states()
    try:
        yield
    finally:
        trainer.model.train(was_training)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in kept:
                _local(tensor).copy_(value)
        _restore_states(optimizer, states)
        vars(trainer).update(written)
        for engine, (stats, fallbacks) in zip(engines, counts, strict=True):
            engine.stats, engine.fallbacks = stats, fallbacks
        if steps is None:
            del trainer.current_gradient_accumulation_steps
        else:
            trainer.current_gradient_accumulation_steps = steps
        _set_random_states(random_states)


def _optimizer(trainer: Any) -> Any:
    """The optimizer below accelerate's wrapper, whose step the scheduler counts."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _restore_states(optimizer: Any, states: dict[Any, dict[str, Any]]) -> None:
    for parameter in [p for p in optimizer.state if p not in states]:
        del optimizer.state[parameter]
    with torch.no_grad():
        for parameter, state in states.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    _local(optimizer.state[parameter][name]).copy_(value)
                else:
                    optimizer.state[parameter][name] = value


def _kept_value(value: Any) -> Any:
    return _local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _held_bytes(trainer: Any) -> int:
    """Of models and optimizer state, each storage once."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    tensors = [
        tensor for m in models if m is not None for tensor in (*m.parameters(), *m.buffers())
    ]
    for state in _optimizer(trainer).state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {
        _local(t).untyped_storage().data_ptr(): _local(t).untyped_storage() for t in tensors
    }
    return sum(storage.nbytes() for storage in storages.values())


def _random_states() -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), devices, random.getstate(), np.random.get_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch_state, devices, python_state, numpy_state = states
    torch.set_rng_state(torch_state)
    if devices:
        torch.cuda.set_rng_state_all(devices)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
