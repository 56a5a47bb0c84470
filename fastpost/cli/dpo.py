"""`fastpost dpo`: preference training with `fastpost.DPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastpost.cli.train import Command, RunFields, prepare, train_and_save


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

    job = prepare(COMMAND, argv, DPOConfig, COLUMNS)
    if job is None:
        return 0
    ref_model = None
    if job.fields.ref_model is not None:
        from transformers import AutoModelForCausalLM

        kwargs = {"trust_remote_code": job.config.trust_remote_code} | job.config.model_init_kwargs
        ref_model = AutoModelForCausalLM.from_pretrained(job.fields.ref_model, **kwargs)
    trainer = DPOTrainer(
        model=job.fields.model,
        ref_model=ref_model,
        args=job.config,
        train_dataset=job.train_data,
        eval_dataset=job.eval_data,
        peft_config=job.fields.lora_config(),
    )
    return train_and_save(trainer, "dpo")
