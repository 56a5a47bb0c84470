"""One of the processes that load a model, each its own part: how much memory that took.

`python -m tests.sharded_loading_child FOLDER` with torchrun's environment: loads FOLDER/small, what
is imported on the way, then FOLDER/large, and writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def anonymous() -> int:
    """Bytes of this process that are no file's: pages of a mapped file are the system's cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


class Peak:
    """The most anonymous memory, looked at every half millisecond."""

    def __enter__(self) -> Peak:
        self.most, self.is_over = anonymous(), False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        self.thread.join()

    def _watch(self) -> None:
        while not self.is_over:
            self.most = max(self.most, anonymous())
            time.sleep(5e-4)


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    spread = {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}
    AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32, **spread)
    before = anonymous()
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "large", dtype=torch.float32, **spread
        )
    kept = sum(p.to_local().numel() * p.itemsize for p in model.parameters())
    found = {"peak": peak.most - before, "kept": kept}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
