"""The progress of a run: how far, how fast, how much work was saved, and how well it learns.

The stock Trainer shows steps and, apart from them, a dictionary of metrics. A run on an engine has
two more things worth watching: the tokens it really processes per second, and the share of the
padded batch that it never had to process. This file shows all of it in one place: a bar updated in
place on a terminal, and elsewhere (a log file, a job's output) a complete line every few seconds,
because a bar redrawn into a file is thousands of unreadable lines.

A step is shown after its metrics are logged, that is when the next step begins or training ends, so
the loss on a line belongs to the step on that line. All counts are those of the main process.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

SHOWN_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "mean_token_accuracy")


class TokenCounts(Protocol):
    """Tokens counted since the engine was installed.

    `padded_tokens`: positions of the padded batches. `row_tokens`: of these, those that are not
    padding. `unique_tokens`: tokens the model processed. `scored_tokens`: those given a log-prob.
    """

    padded_tokens: int
    row_tokens: int
    unique_tokens: int
    scored_tokens: int


class Engine(Protocol):
    """What a progress display needs of an engine: its running token counts."""

    @property
    def stats(self) -> TokenCounts: ...


class ProgressCallback(TrainerCallback):
    """Shows step, ETA, tokens/s, tokens saved, peak memory, loss and the method's key metrics.

    Args:
        label: what the run is called on the display, e.g. "dpo".
        engine: the object whose `stats` count the tokens of this run.
        line_interval_s: seconds between two plain lines when stdout is not a terminal (or
            `disable_tqdm` is set); the first and the last step are always shown.

    Tokens/s counts row tokens (the tokens that are not padding, shared prompts once per row), so
    the figure can be compared with a trainer that processes each of them. "saved" is
    1 - unique/padded: the share of a padded batch removed by packing and prefix sharing.
    """

    def __init__(self, label: str, engine: Engine, line_interval_s: float = 5.0) -> None:
        if line_interval_s < 0:
            raise ValueError(f"line_interval_s must be 0 or more seconds, got {line_interval_s}")
        self.label = label
        self.engine = engine
        self.line_interval_s = line_interval_s
        self._metrics: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._unshown_step = False
        self._last_line_at: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._metrics.clear()
        self._unshown_step = False
        self._last_line_at = None
        self._start_time = time.monotonic()
        self._start_step = state.global_step  # not 0 when resuming
        stats = self.engine.stats
        self._start_counts = (stats.padded_tokens, stats.row_tokens, stats.unique_tokens)
        if state.is_world_process_zero and sys.stdout.isatty() and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.label,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._unshown_step = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self._metrics.update({name: logs[name] for name in SHOWN_METRICS if name in logs})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._show(state, is_last=False)  # the step comes before its evaluation
        metrics = metrics or {}
        shown = [
            f"{name} {metrics[f'eval_{name}']:.4g}"
            for name in SHOWN_METRICS
            if f"eval_{name}" in metrics
        ]
        if shown and state.is_world_process_zero:
            text = " | ".join([f"{self.label} evaluation at step {state.global_step}", *shown])
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._show(state, is_last=False)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._show(state, is_last=True)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, state: TrainerState, is_last: bool) -> None:
        if not self._unshown_step or not state.is_world_process_zero:
            return
        self._unshown_step = self._bar is None
        if self._bar is not None:
            self._bar.n = state.global_step
            self._bar.set_postfix_str(" | ".join(self._figures()), refresh=True)
            return
        now = time.monotonic()
        last = self._last_line_at
        if is_last or last is None or now - last >= self.line_interval_s:
            self._last_line_at = now
            self._unshown_step = False
            print(self._line(state), flush=True)

    def _line(self, state: TrainerState) -> str:
        done = state.global_step - self._start_step
        elapsed = time.monotonic() - self._start_time
        left = timedelta(seconds=round(elapsed / done * (state.max_steps - state.global_step)))
        head = f"{self.label} step {state.global_step}/{state.max_steps}"
        return " | ".join([head, f"ETA {left}", *self._figures()])

    def _figures(self) -> list[str]:
        stats = self.engine.stats
        padded, rows, unique = (
            now - start
            for now, start in zip(
                (stats.padded_tokens, stats.row_tokens, stats.unique_tokens),
                self._start_counts,
                strict=True,
            )
        )
        elapsed = time.monotonic() - self._start_time
        figures = [f"{rows / max(elapsed, 1e-9):,.0f} tokens/s"]
        if padded:
            figures.append(f"{1 - unique / padded:.0%} of padded tokens saved")
        figures.append(f"peak {peak_memory_bytes() / 2**30:.2f} GiB")
        return figures + [f"{name} {value:.4g}" for name, value in self._metrics.items()]


def peak_memory_bytes() -> int:
    """Most memory this process held so far: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def use_progress(trainer: Trainer, label: str) -> None:
    """Replaces the stock progress callbacks by a `ProgressCallback` on `trainer.engine`."""
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(label, trainer.engine))
