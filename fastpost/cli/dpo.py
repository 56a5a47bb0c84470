"""`fastpost dpo`: preference training with `fastpost.DPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastpost.cli.train import Command, Job, RunFields, run


@dataclass(kw_only=True)
class DPORunFields(RunFields):
    """A DPO run's fields: those of every run, and the reference model."""

    ref_model: str | None = field(
        default=None,
        metadata={"help": "Reference model, a folder or id; unset: the model before training"},
    )


COMMAND = Command(
    name="dpo",
    summary=(
        "Preference training. Rows have chosen + rejected, and a prompt (without one, the "
        "beginning that chosen and rejected share is the prompt)."
    ),
    method_fields=("beta", "loss_type", "loss_weights", "precompute_ref_log_probs"),
    run_fields=DPORunFields,
)
COLUMNS = [("chosen", "rejected")]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import DPOConfig, DPOTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, DPOConfig, DPOTrainer, _reference)


def _reference(job: Job) -> dict[str, Any]:
    if job.fields.ref_model is None:
        return {}
    from transformers import AutoModelForCausalLM  # heavy

    kwargs = {"trust_remote_code": job.config.trust_remote_code} | job.config.model_init_kwargs
    return {"ref_model": AutoModelForCausalLM.from_pretrained(job.fields.ref_model, **kwargs)}
