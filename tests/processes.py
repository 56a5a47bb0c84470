"""Several processes of one test over gloo, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_processes(module: str, folder: Path, arguments: Sequence[str] = (), count: int = 2) -> None:
    """Run `python -m module folder *arguments` as every rank of `count`, and require success.

    Args:
        folder: the child's to write in; each rank's output goes there too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, str(folder), *arguments]
    outputs = [folder / f"output-{rank}.txt" for rank in range(count)]
    processes = []
    for rank, path in enumerate(outputs):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        with open(path, "w") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * count, "\n".join(path.read_text()[-4000:] for path in outputs)
