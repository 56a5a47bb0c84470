"""Which reference a method is trained against, by name, and what a run says it uses.

    base     the policy with its adapter switched off
    frozen   a second model that nothing trains, also beside a policy with an adapter
    cached   log-probs computed before training and kept on disk (`fastpost.reference_cache`)
    none     no reference; for methods whose KL term may be left out

`reference=None` leaves the choice to TRL: the adapter switched off where there is one, otherwise a
frozen copy, or what `precompute_ref_log_probs` says.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.utils import is_peft_available
from trl.trainer.utils import create_model_from_path

KINDS = ("base", "frozen", "cached", "none")


@dataclass
class ReferenceConfig:
    """The field of methods with a reference, mixed into their configurations.

    Attributes:
        reference: "base", "frozen", "cached" or "none"; None leaves the choice to TRL.
    """

    reference: str | None = field(
        default=None,
        metadata={
            "help": "Reference: base (adapter off), frozen (second model), cached (log-probs "
            "computed beforehand) or none. Default: TRL's choice."
        },
    )


def has_adapter(model: Any, peft_config: Any = None) -> bool:
    """Whether a policy is trained through an adapter of PEFT."""
    if peft_config is not None:
        return True
    if not is_peft_available():
        return False
    from peft import PeftModel  # optional, and heavy

    return isinstance(model, PeftModel)


def check_reference(
    args: Any, method: str, kinds: tuple[str, ...], adapter: bool, ref_model: Any = None
) -> None:
    """Refuse a kind of reference that the method or the model cannot have.

    Args:
        args: a configuration with `reference`; "cached" sets its `precompute_ref_log_probs`.
        method: the method's name, for messages.
        kinds: the kinds this method takes.
        adapter: whether the policy is trained through an adapter.
        ref_model: the reference model passed to the trainer.

    Raises:
        ValueError: says what contradicts what.
    """
    kind = args.reference
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"reference must be one of {', '.join(KINDS)} or None, got {kind!r}")
    if kind not in kinds:
        raise ValueError(
            f"reference={kind!r} is not possible for {method} here; choose from "
            f"{', '.join(kinds)} or leave reference=None"
        )
    if kind == "base" and not adapter:
        raise ValueError(
            "reference='base' is the policy with its adapter off, but the policy has no adapter; "
            "pass peft_config, or choose reference='frozen'"
        )
    if kind in ("base", "none") and ref_model is not None:
        raise ValueError(
            f"reference={kind!r} uses no second model, but ref_model was passed; leave it out, or "
            "choose reference='frozen'"
        )
    if kind == "cached":
        args.precompute_ref_log_probs = True
    elif getattr(args, "precompute_ref_log_probs", False):
        raise ValueError(
            f"reference={kind!r} contradicts precompute_ref_log_probs=True, which is "
            "reference='cached'; set one of the two"
        )
    name, weight = _weight(args)
    if "none" in kinds and (weight == 0) != (kind == "none"):
        raise ValueError(
            f"reference={kind!r} contradicts {name}={weight}: the reference enters through {name} "
            f"alone, so 'none' goes with {name}=0 and nothing else does"
        )


def _weight(args: Any) -> tuple[str, Any]:
    """Name and value of the weight of the reference: PPO's `kl_coef`, elsewhere `beta`."""
    name = "kl_coef" if hasattr(args, "kl_coef") else "beta"
    return name, getattr(args, name)


def weighs_reference(args: Any) -> bool:
    """Whether the objective has a term with the reference at all."""
    return _weight(args)[1] != 0


def frozen_reference(args: Any, model: Any, ref_model: Any, adapter: bool) -> Any:
    """The second model that `reference="frozen"` asks for.

    Args:
        args: a configuration with `reference` and `model_init_kwargs`.
        model: the policy as passed to the trainer, a model or its name.
        ref_model: the reference as passed to the trainer.
        adapter: whether the policy is trained through an adapter.

    Returns:
        `ref_model`, or a copy of the policy where the trainer would not make one.
    """
    if args.reference != "frozen" or ref_model is not None:
        return ref_model
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).requires_grad_(False).eval()
    if adapter:  # TRL would take the policy without its adapter
        return create_model_from_path(model, **(args.model_init_kwargs or {}))
    return None


def drop_reference_adapter(args: Any, model: Any) -> bool:
    """Where "base" is asked for, remove the frozen copy TRL makes of an adapter it is given.

    Returns:
        Whether there was one: the policy then starts from its adapter, not from the reference.
    """
    if args.reference != "base" or "ref" not in model.peft_config:
        return False
    model.delete_adapter("ref")
    return True


def describe_reference(trainer: Any) -> str:
    """One line: which reference this trainer uses."""
    if getattr(trainer, "precompute_ref_logps", False):
        return trainer.reference_report or "cached"
    ref_model = getattr(trainer, "ref_model", None)
    if ref_model is not None:
        model = trainer.accelerator.unwrap_model(ref_model)
        name = model.config._name_or_path or type(model).__name__
        parameters = sum(parameter.numel() for parameter in model.parameters())
        follows = getattr(trainer.args, "sync_ref_model", False)
        how = "copy that follows the policy" if follows else "frozen copy"
        return f"{how} of {name}, {parameters:,} parameters"
    name, weight = _weight(trainer.args)
    if weight == 0:
        return f"none, {name} is 0"
    if not has_adapter(trainer.model):
        return "none"
    if "ref" in trainer.model.peft_config:
        return "the adapter as it was given, a frozen copy beside the trained one"
    return "adapter switched off"


__all__ = [
    "KINDS",
    "ReferenceConfig",
    "check_reference",
    "describe_reference",
    "drop_reference_adapter",
    "frozen_reference",
    "has_adapter",
    "weighs_reference",
]
