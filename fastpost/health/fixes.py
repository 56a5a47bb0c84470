"""Remedies that findings name, with the run's own numbers in them."""

from __future__ import annotations

from collections.abc import Mapping

_RAISED_BETA = 0.05  # what a run without a KL term is told to begin with


def raise_kl(options: Mapping[str, float]) -> str:
    """ "raise KL beta 0.01 -> 0.05": five times what it is."""
    name = "kl_coef" if "kl_coef" in options else "beta"
    old = options.get(name)
    if not old:
        return f"hold the policy near its reference with KL {name} {_RAISED_BETA:g}"
    return f"raise KL {name} {old:g} -> {5 * old:g}"


def lower_learning_rate(options: Mapping[str, float]) -> str:
    old = options.get("learning_rate")
    return "lower learning_rate" + (f" {old:g} -> {old / 2:g}" if old else "")


ENTROPY_BONUS = "an entropy bonus (entropy_coef 0.001 in GRPO) or a higher sampling temperature"
LENGTH_PENALTY = "a length penalty (fastpost.rewards.length)"

__all__ = ["ENTROPY_BONUS", "LENGTH_PENALTY", "lower_learning_rate", "raise_kl"]
