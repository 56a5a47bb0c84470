"""Reopens a saved adapter: what is on disk is the adapter that was trained, alive and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import safe_open

__all__ = ["check_saved_adapter"]

_FILE = "adapter_model.safetensors"


def check_saved_adapter(folder: str | Path, model: Any, *, has_learnt: bool) -> None:
    """Compare the file with the model's adapter.

    Args:
        folder: what `save_pretrained` wrote into. A folder without an adapter's file passes.
        model: the `PeftModel`.
        has_learnt: whether optimizer steps at a learning rate above zero were taken: then a matrix
            B that is still zero never got a gradient.

    Raises:
        ValueError: tensors that are missing or unknown, of another shape or not finite; an adapter
            whose matrix B is zero, by the name of its layer. Experts of a mixture may never have
            been routed to and are let through.
    """
    path = Path(folder, _FILE)
    if not path.exists():
        return
    name = model.active_adapters[0]
    # The embeddings that PEFT may add beside an adapter are not the adapter's.
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    dead = []
    with safe_open(path, "pt") as file:
        found = set(file.keys())
        missing = sorted(set(expected) - found)
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of the adapter's {len(expected)} tensors, first "
                f"{missing[0]!r} (the file begins with {min(found, default='nothing')!r}): a "
                "wrapper around the model has changed its names"
            )
        for key, tensor in expected.items():
            saved = file.get_tensor(key)
            if saved.shape != tensor.shape:
                raise ValueError(
                    f"{path}: {key} is saved as {tuple(saved.shape)}, the model has "
                    f"{tuple(tensor.shape)}: a shard was saved instead of the whole"
                )
            if not saved.isfinite().all():
                raise ValueError(f"{path}: {key} is not finite; training has diverged")
            if "lora_B" in key and ".experts." not in key and not saved.any():
                dead.append(key.partition(".lora_B")[0].removeprefix("base_model.model."))
    if has_learnt and dead:
        raise ValueError(
            f"{path}: the adapter of {len(dead)} layers is dead, first {dead[0]!r}: its matrix B "
            "is still zero after training. No gradient reaches the layer: it is not called in the "
            "forward, or its output is detached. Leave it out of target_modules"
        )
