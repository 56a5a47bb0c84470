"""One of two processes that load a model together: how much memory of its own it came to hold."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    process = psutil.Process()
    before = process.memory_full_info().uss
    held, loaded = [0], threading.Event()

    def watch() -> None:
        while not loaded.wait(0.005):
            held.append(process.memory_full_info().uss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2)
    )
    sums = []
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        sums.append(float(parameter.to_local().sum()))  # reads the pages that were only mapped
    time.sleep(0.05)
    loaded.set()
    watcher.join()
    sizes = {"peak": max(held), "sum": sum(sums)}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(sizes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
