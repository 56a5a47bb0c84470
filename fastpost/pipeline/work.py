"""What a stage's process does where no command of the command line does it: a job from a file."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpost.pipeline.commands import write_json
from fastpost.pipeline.scorers import Rewards, evaluate

__all__ = ["do_job"]


def do_job(path: Path, rewards: Rewards) -> None:
    """Do the job in `path`.

    Args:
        path: what `commands.work_command` wrote.
        rewards: name of a reward -> functions of TRL's form.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    work = job.pop("work")
    if work == "evaluate":
        _evaluate(job, rewards)
    elif work == "link":
        _link(Path(job["model"]), Path(job["output"]))
    else:
        from fastpost.pipeline.loop_stage import run_loop  # trainers: heavy

        run_loop(job, rewards)


def _evaluate(job: Mapping[str, Any], rewards: Rewards) -> None:
    started = time.monotonic()
    before = None
    if job["compared_with"] is not None:
        before = json.loads(Path(job["compared_with"]).read_text(encoding="utf-8"))
    found = evaluate(job["model"], job["scorers"], rewards=rewards, before=before)
    for name, why in found.skipped.items():
        print(f"skipped {name}: {why}", flush=True)
    write_json(
        Path(job["output"]),
        {
            "fingerprint": job["fingerprint"],
            "model": job["model"],
            "seconds": time.monotonic() - started,
            **found.as_dict(),
        },
    )


def _link(model: Path, output: Path) -> None:
    """The files of a whole model under another name, without a second copy where possible."""
    building = output.with_name(f".{output.name}-building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for file in sorted(p for p in model.iterdir() if p.is_file()):
        if file.name == "training_args.bin" or file.suffix == ".jsonl":
            continue  # of the training, and pickled
        try:
            os.link(file, building / file.name)
        except OSError:  # another disk
            shutil.copy2(file, building / file.name)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(building, output)
