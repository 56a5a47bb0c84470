"""`fastpost doctor`: what this machine offers; with `--gpu`, whether its kernels are right."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict

from fastpost.cli.recipe import UsageError

USAGE = """usage: fastpost doctor [--gpu] [--json]
       fastpost doctor data FILE --model MODEL

Says in plain words what this machine offers for training and what is missing.

  data    checks training data instead; `fastpost doctor data --help` says more
  --gpu   checks every kernel on the GPU against a float64 reference instead
  --json  prints JSON

Exit code 1 if something stops training, or a kernel is wrong or could not be checked on a GPU."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if argv[:1] == ["data"]:
        from fastpost.cli import doctor_data

        return doctor_data.main(argv[1:])
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    unknown = [word for word in argv if word not in ("--gpu", "--json")]
    if unknown:
        raise UsageError(f"doctor takes --gpu and --json, got {' '.join(unknown)}")
    return _kernels("--json" in argv) if "--gpu" in argv else _environment("--json" in argv)


def _environment(as_json: bool) -> int:
    from fastpost.doctor.environment import environment  # heavy

    found = environment()
    if as_json:
        print(json.dumps([asdict(f) for f in found], indent=2))
    for f in () if as_json else found:
        text = f"{f.status:8} {f.subject:14} {f.text}" + (f". Fix: {f.fix}" if f.fix else "")
        print(textwrap.fill(text, 100, subsequent_indent=" " * 24))
    return int(any(f.status == "problem" for f in found))


def _kernels(as_json: bool) -> int:
    import torch  # heavy

    from fastpost.doctor.environment import interpreter  # heavy

    message = None
    if not torch.cuda.is_available():
        message = "There is no GPU that torch can use, so no kernel was checked."
    elif found := interpreter():
        message = f"No kernel was checked: {found[0].text}. Fix: {found[0].fix}"
    if message is not None:
        shown = textwrap.fill(message, 100)
        print(json.dumps({"message": message, "checks": []}) if as_json else shown)
        return int(torch.cuda.is_available())
    from fastpost.doctor.kernel_checks import run_checks  # heavy

    results = []
    for r in run_checks("cuda"):
        results.append(r)
        if not as_json:
            print(
                f"{'ok' if r.ok else 'FAIL':4} {r.op} {r.dtype} {r.form}, {r.shape}: "
                f"{r.error:.1e} of {r.tolerance:.1e}" + (f"; {r.fault}" if r.fault else ""),
                flush=True,
            )
    if as_json:
        print(json.dumps({"checks": [asdict(r) for r in results]}, indent=2))
    return int(not all(r.ok for r in results))
