"""`fastpost tune`: measures the choices of the kernels on this GPU and stores the faster ones."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastpost.cli.recipe import UsageError

if TYPE_CHECKING:
    import torch

    from fastpost.tune.tuner import Outcome

USAGE = """usage: fastpost tune [--json] [--reset]

Measures which of several right ways is faster on this machine's GPU and stores what won, for this
GPU and these versions. Results stay the same up to rounding. Without it kernels take conservative
defaults. It takes minutes; leave the GPU idle meanwhile.

  --json   prints JSON
  --reset  removes what was stored, for every GPU, and measures nothing"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    unknown = [word for word in argv if word not in ("--json", "--reset")]
    if unknown:
        raise UsageError(f"tune takes --json and --reset, got {' '.join(unknown)}")
    as_json = "--json" in argv
    return _reset(as_json) if "--reset" in argv else _tune(as_json)


def _reset(as_json: bool) -> int:
    from fastpost_kernels._choices import choices_file, forget  # heavy

    removed = sorted(choices_file("any").parent.glob("*.json"))
    for path in removed:
        path.unlink()
    forget()
    text = f"Removed {len(removed)} files of stored choices: kernels take their defaults."
    print(json.dumps({"removed": [str(path) for path in removed]}) if as_json else text)
    return 0


def _tune(as_json: bool) -> int:
    from fastpost_kernels._device import triton_is_interpreted  # heavy

    devices, message = _gpus(), None
    if not devices:
        message = "There is no GPU that torch can use, so nothing was measured."
    elif triton_is_interpreted():
        message = "TRITON_INTERPRET is set, so nothing was measured; unset it and start again."
    if message is not None:
        print(json.dumps({"message": message, "devices": []}) if as_json else message)
        return 0
    found = [_tune_device(device, as_json) for device in devices]
    if as_json:
        print(json.dumps({"devices": found}, indent=2))
    return int(any("error" in one for one in found))


def _gpus() -> list[torch.device]:
    """One GPU of every kind in this machine."""
    import torch  # heavy

    from fastpost_kernels._choices import device_name

    if not torch.cuda.is_available():
        return []
    all_of_them = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return list({device_name(device): device for device in reversed(all_of_them)}.values())[::-1]


def _tune_device(device: torch.device, as_json: bool) -> dict[str, Any]:
    from fastpost.tune.stopwatch import CudaStopwatch  # heavy
    from fastpost.tune.subjects import subjects
    from fastpost.tune.tuner import GpuLost, chosen_table, tune
    from fastpost_kernels._choices import device_name, save

    name = device_name(device)
    assert name is not None
    outcomes: list[Outcome] = []
    try:
        for outcome in tune(subjects(), device, CudaStopwatch(device)):
            outcomes.append(outcome)
            if not as_json:
                print(line(outcome), flush=True)
    except GpuLost as error:
        text = f"{name} stopped working, nothing was stored: {error}"
        if not as_json:
            print(text)
        return {"device": name, "error": text, "outcomes": as_dicts(outcomes)}
    path = save(name, chosen_table(outcomes), as_dicts(outcomes))
    if not as_json:
        print(summary(name, outcomes), f"Stored in {path}", sep="\n")
    return {"device": name, "path": str(path), "outcomes": as_dicts(outcomes)}


def as_dicts(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as JSON has them, with what follows from the numbers."""
    return [asdict(outcome) | {"chosen": outcome.chosen} for outcome in outcomes]


def line(outcome: Outcome) -> str:
    """An outcome in one paragraph of at most 100 columns."""
    head = f"{outcome.choice:18} {outcome.title}: "
    if outcome.fault is not None:
        text = head + f"not measured, {outcome.default} stays; {outcome.fault}"
    else:
        parts = [
            f"{trial.option} left out, {trial.fault}"
            if trial.gain is None or trial.seconds is None
            else f"{trial.option} {1e3 * trial.seconds:.3g} ms ({-trial.gain:+.1%})"
            for trial in outcome.trials
        ]
        times = [t.default_seconds for t in outcome.trials if t.default_seconds is not None]
        own = f" {1e3 * times[0]:.3g} ms" if times else ""
        text = head + f"{outcome.default}{own}; {'; '.join(parts)} -> {outcome.chosen}"
    return textwrap.fill(text, 100, subsequent_indent=" " * 19)


def summary(device: str, outcomes: list[Outcome]) -> str:
    """What tuning gained, and what could not be measured."""
    gains = [outcome.winner.gain or 0.0 for outcome in outcomes if outcome.winner is not None]
    skipped = sum(outcome.fault is not None for outcome in outcomes)
    text = f"{device}: the defaults are best at all {len(outcomes) - skipped} shapes measured."
    if gains:
        text = (
            f"{device}: {len(gains)} of {len(outcomes) - skipped} measured choices changed, which "
            f"saves {min(gains):.1%} to {max(gains):.1%} of their time."
        )
    text += f" {skipped} shapes could not be measured." if skipped else ""
    return textwrap.fill(text, 100)
