"""LoRA+: the matrices B learn faster than the matrices A.

B starts at zero and A at random, so that at one learning rate B's features lag behind; a ratio of
about 16 makes both matter alike. DoRA's magnitudes, biases and whatever else is trained stay at the
base rate. Source: Hayou et al., "LoRA+" (arXiv:2402.12354), section 4.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

__all__ = ["require_lora_b", "split_groups"]

# PEFT's names of B: of linear and convolutional layers, and of embeddings.
_MARKS = ("lora_B.", "lora_embedding_B.")


def require_lora_b(model: nn.Module, ratio: float) -> None:
    """Refuse a ratio that would do nothing or cannot be meant.

    Raises:
        ValueError: it is below 1, or the model trains no matrix B.
    """
    if not ratio >= 1:
        raise ValueError(
            f"lora_plus_ratio must be at least 1, got {ratio}: it multiplies the learning rate of "
            "the matrices B; 16 is the paper's choice, 1 is plain LoRA"
        )
    if not any(_is_b(name) and p.requires_grad for name, p in model.named_parameters()):
        raise ValueError(
            "lora_plus_ratio is set, but the model trains no LoRA matrix B: pass peft_config="
            "LoraConfig(...), or leave lora_plus_ratio out"
        )


def split_groups(optimizer: Optimizer, model: nn.Module, ratio: float) -> list[int]:
    """Give every group's matrices B a group of their own, at `ratio` times its learning rate.

    Args:
        optimizer: without state yet; of any class. Its groups hold parameters of `model`, sharded
            or not, and keep their other settings.
        model: PEFT's, whose names say which parameters are B.
        ratio: at least 1; 1 changes nothing.

    Returns:
        Indices of the new groups in `optimizer.param_groups`.

    Raises:
        ValueError: the optimizer has stepped already.
    """
    if optimizer.state:
        raise ValueError("the optimizer has state already: split its groups before the first step")
    if ratio == 1:
        return []
    matrices = {id(p) for name, p in model.named_parameters() if _is_b(name)}
    fresh = []
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in matrices]
        if not chosen:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in matrices]
        settings = {key: value for key, value in group.items() if key != "params"}
        fresh.append(len(optimizer.param_groups))
        optimizer.add_param_group({**settings, "params": chosen, "lr": ratio * group["lr"]})
    return fresh


def _is_b(name: str) -> bool:
    return any(mark in name for mark in _MARKS)
