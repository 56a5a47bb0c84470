"""The policy and its reference, ready to be wrapped: loaded, adapter on, dropout off."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastpost.references import has_adapter


def init_arguments(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: fp32 unless told otherwise; JSON is read."""
    if isinstance(given, str):
        return {"dtype": "float32", **json.loads(given)}
    return {"dtype": "float32", **(given or {})}


def prepare_policy(
    model: Any, peft_config: Any, init_kwargs: dict[str, Any], *, checkpoints_gradients: bool
) -> Any:
    """The model to train: loaded from its path, under a new adapter where one is asked for.

    Dropout is switched off: old and new log-probs of an unchanged policy must be equal.

    Raises:
        TypeError: neither a path nor a causal language model.
        ValueError: an adapter is asked for on a model that has one.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
    base = base_model(model)
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
        raise TypeError(
            "model must be a path or a transformers causal language model (or one wrapped by "
            f"PEFT), got {type(model).__name__}"
        )
    if peft_config is not None:
        from peft import get_peft_model  # optional, and heavy

        if has_adapter(model):
            raise ValueError(
                "peft_config was given with a model that has an adapter; leave peft_config out to "
                "go on with it, or merge it first (model.merge_and_unload())"
            )
        model = get_peft_model(model, peft_config)
    if has_adapter(model) and checkpoints_gradients:
        # the embeddings are frozen, and a checkpointed block needs an input with a gradient
        model.enable_input_require_grads()
    switch_off_dropout(model)
    return model


def prepare_reference(policy: Any, ref_model: Any, init_kwargs: dict[str, Any]) -> Any:
    """The frozen reference; None where the policy with its adapter off is the reference."""
    if ref_model is None:
        if has_adapter(policy):
            return None
        ref_model = copy.deepcopy(policy)
    elif isinstance(ref_model, str):
        ref_model = AutoModelForCausalLM.from_pretrained(ref_model, **init_kwargs)
    switch_off_dropout(ref_model)
    return ref_model.requires_grad_(False).eval()


def prepare_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer given, or the one in the model's folder; with a padding token.

    Raises:
        ValueError: none is given and the model does not say where it came from, or it has no end
            token.
    """
    if tokenizer is None:
        source = base_model(model).config._name_or_path
        if not source:
            raise ValueError("processing_class is None and model has no path; give the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no eos_token, so no completion would ever end; set it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_model(model: Any) -> Any:
    """The transformers model below PEFT's wrapper, or the model itself."""
    return model.get_base_model() if has_adapter(model) else model


def switch_off_dropout(model: nn.Module) -> None:
    """Modules of dropout and the rates that attention layers keep as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


__all__ = [
    "base_model",
    "init_arguments",
    "prepare_policy",
    "prepare_reference",
    "prepare_tokenizer",
    "switch_off_dropout",
]
