"""A plan in a process of its own (`python -m fastpost.planning.apart`), for distributed runs.

A process that takes part in a run cannot pretend to be one of others. Request, configuration and
`on_gpu` come pickled from standard input; the answer goes, pickled, to the file that is named.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastpost.planning.composition import trace_composed
from fastpost.planning.request import Request
from fastpost.planning.trace import Traced

__all__ = ["trace_apart"]

# Variables by which a process knows that it takes part in a run.
_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "MASTER_")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def trace_apart(request: Request, config: Any, *, on_gpu: bool = True) -> Traced:
    """As `composition.trace_composed`, in a new process.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_PREFIXES) and name not in _NAMES
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "traced"
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(file)],
            input=pickle.dumps((request, config, on_gpu)),
            env=env | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"planning in a process of its own failed: {' '.join(lines[-1:])}")
        found: Traced = pickle.loads(file.read_bytes())
        return found


def main() -> None:
    request, config, on_gpu = pickle.loads(sys.stdin.buffer.read())
    traced = trace_composed(request, config, on_gpu=on_gpu)
    Path(sys.argv[1]).write_bytes(pickle.dumps(traced))


if __name__ == "__main__":
    main()
