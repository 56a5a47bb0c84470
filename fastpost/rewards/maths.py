"""Reward for mathematics: 1.0 if the completion's answer equals the gold answer (math-verify).

Sympy can take for ever on `10^{10^{10}}`, and math-verify's own timeout needs the main thread's
SIGALRM. So answers are compared in one worker process, killed and replaced when it is late: this
works from any thread, and nothing is left running.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .completion import Completion, Reward, column, completion_text

_START_SECONDS = 60.0  # importing sympy on a busy machine
_REPLY_BYTES = 4096


class _Late(Exception):
    """The worker did not answer in time."""


class MathsComparer:
    """A worker process that compares answers; use as a context manager or call `close`.

    Args:
        timeout_seconds: for one answer, parsing included.
    """

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; give a number above 0")
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compare(self, gold: str, answer: str) -> float | None:
        """1.0 equal, 0.0 not (or the answer is late or no mathematics), None: gold unparseable."""
        with self._lock:
            try:
                if self._ask({"gold": gold}) is False:
                    return None
            except _Late:
                return None
            try:
                return float(bool(self._ask({"gold": gold, "answer": answer})))
            except _Late:
                return 0.0

    def close(self) -> None:
        """Kills the worker; the next comparison would start another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def __enter__(self) -> MathsComparer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, str]) -> bool:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("maths_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._read_line(_START_SECONDS, "math-verify did not import: install math-verify")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise _Late from None
        return json.loads(self._read_line(self.timeout_seconds))

    def _read_line(self, seconds: float, or_else: str | None = None) -> bytes:
        """One short line; without it the worker dies, with RuntimeError if `or_else` is given."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline, line = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                chunk = b""
                if left > 0 and selector.select(left):
                    chunk = os.read(pipe, _REPLY_BYTES)
                if not chunk:
                    self.close()
                    raise RuntimeError(or_else) if or_else else _Late
                line += chunk
        return line


def maths_reward(comparer: MathsComparer | None = None, *, gold_column: str = "solution") -> Reward:
    """Builds the reward; `gold_column` names the dataset column with the right answers.

    Gold may be LaTeX with or without dollars, or a number. Unparseable gold gives None.
    """
    used = comparer or MathsComparer()

    def reward(
        prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        golds = column(gold_column, columns, len(completions))
        return [
            None if gold is None else used.compare(str(gold), completion_text(completion))
            for gold, completion in zip(golds, completions, strict=True)
        ]

    reward.__name__ = "maths_reward"
    return reward
