"""Training runs in processes that are forked from one that has imported everything.

A run costs its own time only. `Server` starts the program; as a program (`python -m
tests.checkpoints.forked`) it takes one run a line and answers with the exit statuses of its
processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


class Server:
    """Carries out runs; to be closed."""

    def __init__(self, folder: Path) -> None:
        self._errors = folder / "errors.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoints.forked"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "FASTPOST_CACHE": str(folder / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.open("w"),
            text=True,
        )

    def run(self, job: str, processes: int = 1, kill_after: float | None = None, **options: Any):
        """Exit statuses of the processes that do `job`, a function of `tests.checkpoints.jobs`.

        Args:
            kill_after: seconds after which all of them are killed.
        """
        line = {"job": job, "processes": processes, "kill_after": kill_after, "options": options}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(line, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.errors()
        return json.loads(answer)

    def errors(self) -> str:
        return self._errors.read_text()[-6000:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve() -> None:
    from tests.checkpoints import jobs

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(order["processes"]):
            child = os.fork()
            if child == 0:
                _be_process(jobs, order, rank, port)
            children.append(child)
        if order["kill_after"] is not None:
            time.sleep(order["kill_after"])
            # Stopped first: none sees that another is gone.
            for signal_number in (signal.SIGSTOP, signal.SIGKILL):
                for child in children:
                    os.kill(child, signal_number)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers.write(json.dumps(statuses) + "\n")
        answers.flush()


def _be_process(jobs: Any, order: dict[str, Any], rank: int, port: int) -> None:
    count = order["processes"]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = map(str, (rank, rank, count, count, port))
    os.environ |= dict(zip(names, values, strict=True)) | {"MASTER_ADDR": "127.0.0.1"}
    try:
        getattr(jobs, order["job"])(**order["options"])
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve()
