"""`fastpost cpo`: CPO and SimPO with `fastpost.CPOTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, run

COMMAND = Command(
    name="cpo",
    summary=(
        "Preference training without a reference model: CPO, and SimPO with loss_type simpo. Rows "
        "have prompt, chosen and rejected."
    ),
    method_fields=("beta", "loss_type", "cpo_alpha", "simpo_gamma"),
)
COLUMNS = [("prompt", "chosen", "rejected")]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import CPOConfig, CPOTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, CPOConfig, CPOTrainer)
