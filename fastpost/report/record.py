"""What a training keeps for its report: `fastpost_record.jsonl` in its `output_dir`.

    {"event": "begin", "step", "time", "max_steps", "method", "device", "epochs"}
    {"event": "trial", "predicted", "measured", "reason"}       bytes of the trial step
    {"event": "log", "step", "seconds", "tokens", "peak", "logs"}
    {"event": "health", "monitor", "step", "illness", "figures", "fix", "action"}
    {"event": "end", "step", "seconds"}

A run that was killed and resumed appends: a `begin` at step n takes back every line after step n.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpost.health.monitor import HealthMonitor
from fastpost.health.non_finite import NonFinite
from fastpost.progress import peak_memory_bytes
from fastpost.report.reading import RECORD

__all__ = ["RunRecorder", "record_run"]


def record_run(trainer: Any, method: str) -> None:
    """Watch a trainer's health, and keep what its report needs."""
    if isinstance(getattr(trainer, "_logs", None), dict) and "completion" in trainer._logs:
        monitor = HealthMonitor.attach(trainer)
    else:
        monitor = HealthMonitor()
        trainer.add_callback(monitor)
    if trainer.args.optimizer_in_backward:
        # It leaves out updates that are made by then, and is refused.
        monitor.monitors = [m for m in monitor.monitors if not isinstance(m, NonFinite)]
    trainer.add_callback(RunRecorder(trainer, monitor, method))


class RunRecorder(TrainerCallback):
    """Writes the record of the main process, line by line as it happens.

    Args:
        trainer: with an `engine`.
        monitor: whose findings are kept.
        method: what the run is called.
        folder: where the record lies; None is the trainer's `output_dir`.
    """

    def __init__(
        self, trainer: Any, monitor: HealthMonitor, method: str, folder: Path | None = None
    ) -> None:
        self._trainer, self._monitor, self._method = trainer, monitor, method
        self._path = Path(folder or trainer.args.output_dir) / RECORD
        self._told = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()
        self._told = len(self._monitor.findings)
        begin = {
            "step": state.global_step,
            "time": time.time(),
            "max_steps": state.max_steps,
            "method": self._method,
            "device": str(args.device),
            "processes": args.world_size,
        }
        self._write(state, "begin", begin)
        for callback in self._trainer.callback_handler.callbacks:
            trial = getattr(callback, "found", None)
            if trial is not None:
                figures = {name: getattr(trial, name) for name in ("predicted", "measured")}
                self._write(state, "trial", {**figures, "reason": trial.reason})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self._write(
            state,
            "log",
            {
                "step": state.global_step,
                "seconds": time.monotonic() - self._began,
                "tokens": self._trainer.engine.stats.row_tokens,
                "peak": peak_memory_bytes(),
                "logs": numbers,
            },
        )
        self._tell_health(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell_health(state)
        seconds = time.monotonic() - self._began
        self._write(state, "end", {"step": state.global_step, "seconds": seconds})

    def _tell_health(self, state: Any) -> None:
        findings = list(self._monitor.findings)
        for finding in findings[self._told :]:
            self._write(state, "health", dict(vars(finding)))
        self._told = len(findings)

    def _write(self, state: Any, event: str, values: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
