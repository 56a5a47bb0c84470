"""`fastpost demo`: trains a small model on this machine and shows what it learnt."""

from __future__ import annotations

import logging

from fastpost.cli.recipe import UsageError


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if argv in (["-h"], ["--help"]):
        print(
            "usage: fastpost demo\n\nTrains a small model on this machine and shows what it learnt."
        )
        return 0
    if argv:
        raise UsageError(f"demo takes no options, got {' '.join(argv)}")
    # PEFT imports it where it is installed; it warns of inference kernels that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from fastpost.demo.run import run_demo  # heavy

    run_demo()
    return 0
