"""What the trainers share: our forward at the place where TRL installs its own.

TRL's trainers call `add_fused_lm_head(model, ...)`, a name of their own module, in the middle of
their constructors: after the model is wrapped by PEFT, before the reference model is wrapped by
accelerate and before reference log-probs are computed. Swapping that name while the constructor
runs puts our forward at exactly that point, and rewrites nothing else. The reference model is
sharded by layer at the same point, before TRL makes one unit of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fastpost.scoring import Engine, accelerate_model
from fastpost.sharding import shard_reference


@contextmanager
def engine_at_seam(trl_module: ModuleType, args: Any) -> Iterator[list[Engine]]:
    """Install our forward wherever the module's trainer would install TRL's.

    Args:
        trl_module: the module whose trainer is being constructed.
        args: a config with `prefix_sharing` and `memory_budget_gb`.

    Yields:
        The engines in order of installation: the policy's, then the reference's if there is one.
    """
    engines: list[Engine] = []

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        engine = accelerate_model(
            model,
            prefix_sharing=args.prefix_sharing,
            memory_budget_gb=args.memory_budget_gb,
            temperature=temperature,
            cast_lm_head_to_fp32=cast_lm_head_to_fp32,
            outputs=outputs,
        )
        if engines:
            shard_reference(model, engines[0].model)
        engines.append(engine)

    stock = trl_module.add_fused_lm_head
    trl_module.add_fused_lm_head = add_fused_lm_head  # type: ignore[attr-defined]
    try:
        yield engines
    finally:
        trl_module.add_fused_lm_head = stock  # type: ignore[attr-defined]


__all__ = ["engine_at_seam"]
