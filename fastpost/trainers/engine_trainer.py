"""What every trainer of ours does beside its method."""

from __future__ import annotations

import logging

from fastpost.scoring import Engine

logger = logging.getLogger("fastpost")


class EngineTrainer:
    """Mixed in before a `transformers.Trainer` of one method.

    Attributes:
        engine: the engine of the policy.
        ref_engine: the engine of the reference model, None where there is no second model.
    """

    engine: Engine
    ref_engine: Engine | None

    def _take_engines(self, engines: list[Engine]) -> None:
        """Keep what the seam installed: the policy's engine, then the reference's."""
        self.engine = engines[0]
        self.ref_engine = engines[1] if len(engines) > 1 else None
        logger.info(self.engine.report())


__all__ = ["EngineTrainer"]
