"""Which layers are checkpointed and where their inputs wait, also when switched off and on again.

transformers takes `every_n_layers` and `offload` out of `activation_checkpointing_kwargs` before it
switches checkpointing on. TRL switches it off for the reference pass and for generation, and on
again with the whole dictionary, which `torch.utils.checkpoint` then refuses. `offload` is that of
`fastpost.offloaded_states`: transformers' own copies on the stream that computes.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from fastpost.offloaded_states import offloading

LAYER_OPTIONS = ("every_n_layers", "offload")


def refuse_unused(args: Any) -> None:
    """Refuse layer options of a run that checkpoints nothing.

    Raises:
        ValueError: names the option.
    """
    options = args.activation_checkpointing_kwargs or {}
    given = [name for name in LAYER_OPTIONS if name in options]
    if given and not args.activation_checkpointing:
        raise ValueError(
            f"activation_checkpointing_kwargs={options} asks for {' and '.join(given)}, but "
            "activation_checkpointing is False: nothing would be checkpointed. Set it to True, or "
            "leave these out"
        )


def keep_layer_options(model: Any, options: dict[str, Any] | None) -> None:
    """Let `model.gradient_checkpointing_enable` take the layer options out of its dictionary.

    Args:
        model: of transformers, or a PEFT model around one; it alone is changed, not its class.
        options: `activation_checkpointing_kwargs`; without a layer option nothing is changed.
    """
    if not set(LAYER_OPTIONS) & set(options or ()):
        return
    base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    enable = type(base)._activation_checkpointing_enable

    def gradient_checkpointing_enable(
        gradient_checkpointing_kwargs: dict[str, Any] | None = None, **layer_options: Any
    ) -> None:
        rest = dict(gradient_checkpointing_kwargs or {})
        for name in LAYER_OPTIONS:
            if name in rest:
                layer_options[name] = rest.pop(name)
        offload = layer_options.pop("offload", False)
        enable(base, rest or None, **layer_options)
        if offload:
            _offload_inputs(base)

    base.gradient_checkpointing_enable = gradient_checkpointing_enable


def _offload_inputs(model: PreTrainedModel) -> None:
    """Let the layers that are checkpointed keep their inputs in host memory."""
    run = None
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            run = run or offloading(module._gradient_checkpointing_func)
            module._gradient_checkpointing_func = run
