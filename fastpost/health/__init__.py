"""Monitors that tell when a run falls ill: hacked rewards, collapse, drift, dead gradients, NaN."""

from fastpost.health.dead_gradients import DeadGradients
from fastpost.health.finding import Finding
from fastpost.health.length_drift import LengthDrift
from fastpost.health.mode_collapse import ModeCollapse
from fastpost.health.monitor import HealthMonitor
from fastpost.health.non_finite import NonFinite
from fastpost.health.openings import OverusedOpenings
from fastpost.health.reading import Reading
from fastpost.health.reward_hacking import RewardHacking
from fastpost.health.zero_variance import ZeroVarianceGroups

__all__ = [
    "DeadGradients",
    "Finding",
    "HealthMonitor",
    "LengthDrift",
    "ModeCollapse",
    "NonFinite",
    "OverusedOpenings",
    "Reading",
    "RewardHacking",
    "ZeroVarianceGroups",
]
