"""What is asked of a model with a classification head before it is trained.

The head of a classifier made from a language model is drawn at random when it is loaded. An adapter
that does not save it comes back with another head, and every reward is noise: no error is raised.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_HEAD_NAMES = ("score", "classifier")


def refuse_unsaved_head(model: nn.Module) -> None:
    """Refuse a PEFT model that trains no copy of its head and therefore saves none.

    Raises:
        ValueError: names the options of the adapter that save it.
    """
    if not hasattr(model, "get_base_model"):
        return
    # PEFT's wrapper of a module that is trained and saved in full has this attribute.
    saved = [name for name, module in model.named_modules() if hasattr(module, "modules_to_save")]
    if not any(name.endswith(_HEAD_NAMES) for name in saved):
        raise ValueError(
            "the adapter would not save the classification head, which would be random again on "
            'reload; use task_type="SEQ_CLS" ("TOKEN_CLS" for a process reward model) or '
            'modules_to_save=["score"] in its PeftConfig'
        )


def refuse_head_budget(args: Any) -> None:
    """Refuse `memory_budget_gb` where there is no language-model head.

    Raises:
        ValueError: it is set.
    """
    if args.memory_budget_gb is not None:
        raise ValueError(
            f"memory_budget_gb={args.memory_budget_gb} has nothing to budget: a reward model has "
            "no language-model head; leave it None"
        )


__all__ = ["refuse_head_budget", "refuse_unsaved_head"]
