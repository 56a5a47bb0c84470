"""What the configurations of on-policy methods have beside the fields of their method."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RolloutConfig:
    """Fields of the rollout, mixed into a method's configuration.

    Attributes:
        rollout_dtype: sample from a copy in this dtype ("bfloat16", "float16", "float32") that
            receives the trained weights before each rollout. None: from the model itself.
        rollout_mismatch_limit: largest KL between sampling and learning model, in nats a token,
            that a run survives. None measures without stopping, and only where the two differ.
    """

    rollout_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the copy to sample from. None: sample from the model itself."},
    )
    rollout_mismatch_limit: float | None = field(
        default=None,
        metadata={"help": "KL (nats a token) of sampling and learning model that stops the run."},
    )


__all__ = ["RolloutConfig"]
