"""What a training run needs, predicted by tracing it: memory per GPU, FLOPs, time, disk.

The real model, engine, adapters, checkpointing, sharding and optimizer run on tensors without
memory; what they would allocate is counted. See `docs/planning.md`.
"""

from fastpost.planning.planner import Plan, plan
from fastpost.planning.request import Adapter, Request, parse_gpus

__all__ = ["Adapter", "Plan", "Request", "parse_gpus", "plan"]
