"""Options of the trainers below us that our forward would break, or that a method never reads.

`transformers.TrainingArguments` has over a hundred fields. Most act on the loop around the model
and need nothing from us. The ones here act on the model's forward, which is ours, or are read by a
method's trainer nowhere: such a run would look healthy and be another run than the one asked for.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

# Configs whose trainers draw prompts with a sampler of their own.
_OWN_SAMPLER = {"GRPOConfig", "RLOOConfig"}

_SYNCED = ("sync_ref_model", {True})
_PRECOMPUTED = ("precompute_ref_log_probs", {True})
_ENCODER_DECODER = ("is_encoder_decoder", {True})
_VLLM = ("use_vllm", {True})
_VLLM_FIELDS = (
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
)
_GROUPS = {
    **dict.fromkeys((*_VLLM_FIELDS, "vllm_max_model_length"), _VLLM),
    "ref_model_mixup_alpha": _SYNCED,
    "ref_model_sync_steps": _SYNCED,
    "num_completions_to_print": ("log_completions", {True}),
    "transformers_continuous_batching_config": ("use_transformers_continuous_batching", {True}),
}
# Config -> field -> the field and its values under which the trainer reads the first one. Given
# otherwise, it would be dropped without a word.
_READ_ONLY_UNDER: dict[str, dict[str, tuple[str, set[Any]]]] = {
    "DPOConfig": {
        "label_smoothing": ("loss_type", {"exo_pair", "robust", "aot", "aot_unpaired"}),
        "discopop_tau": ("loss_type", {"discopop"}),
        "f_alpha_divergence_coef": ("f_divergence_type", {"alpha_divergence"}),
        "precompute_ref_batch_size": _PRECOMPUTED,
        "ref_model_mixup_alpha": _SYNCED,
        "ref_model_sync_steps": _SYNCED,
    },
    "KTOConfig": {
        "precompute_ref_batch_size": _PRECOMPUTED,
        "ref_model_mixup_alpha": _SYNCED,
        "ref_model_sync_steps": _SYNCED,
    },
    "CPOConfig": {
        "label_smoothing": ("loss_type", {"sigmoid", "simpo"}),
        "simpo_gamma": ("loss_type", {"simpo"}),
        "max_completion_length": _ENCODER_DECODER,
    },
    "ORPOConfig": {"max_completion_length": _ENCODER_DECODER},
    "OnlineDPOConfig": dict.fromkeys(_VLLM_FIELDS, _VLLM),
    "RLOOConfig": _GROUPS,
    "GRPOConfig": {
        **_GROUPS,
        **dict.fromkeys(
            (
                "vllm_importance_sampling_cap",  # sets clip_max, so it is asked about before it
                "vllm_importance_sampling_correction",
                "vllm_importance_sampling_mode",
                "vllm_importance_sampling_clip_max",
                "vllm_importance_sampling_clip_min",
            ),
            _VLLM,
        ),
        **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("loss_type", {"sapo"})),
        **dict.fromkeys(
            ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
            ("loss_type", {"vespo"}),
        ),
        **dict.fromkeys(
            ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
            ("use_adaptive_entropy", {True}),
        ),
    },
}


def refuse_options(args: Any) -> None:
    """Refuse options that would be ignored or computed differently from what they promise.

    Liger's layers are kept and its fused loss is switched off in place, as TRL does for the methods
    it has: that loss would replace the model's forward.

    Raises:
        ValueError: names the option, the value given, and what to use instead.
    """
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} is not supported: its noise is drawn "
            "per padded row and scaled by the padded length, and there are no padded rows here. "
            "Leave it None, or train with TRL's own trainer"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True is not supported: rows are packed on the host inside the forward, "
            "which cannot be traced. The head and the packed attention are kernels already; on a "
            'GPU, model_init_kwargs={"use_kernels": True} fuses the remaining layers'
        )
    _refuse_smoothing(args)
    _refuse_parallelism(args.parallelism_config)
    _check_liger(args)
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError(
            "activation_offloading=True moves activations from an accelerator to the CPU, and this "
            "run is on the CPU; set it to False"
        )
    _refuse_unread(args)
    if _is_a(args, {"OnlineDPOConfig"}) and args.reward_model_path is not None:
        raise ValueError(
            f"reward_model_path={args.reward_model_path!r} would be ignored: rewards come from "
            "the trainer's argument reward_funcs, which takes a path too"
        )
    if args.train_sampling_strategy != "random" and _is_a(args, _OWN_SAMPLER):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not read by this "
            "trainer, whose sampler repeats each prompt num_generations times; use "
            "shuffle_dataset=False for the order of the data set"
        )


def _refuse_unread(args: Any) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    for name, conditions in _READ_ONLY_UNDER.items():
        if not _is_a(args, {name}):
            continue
        for option, (other, values) in conditions.items():
            given, setting = getattr(args, option), getattr(args, other)
            if given == defaults[option]:
                continue
            settings = set(setting) if isinstance(setting, list) else {setting}
            if not settings & values:
                expected = " or ".join(repr(value) for value in sorted(values))
                raise ValueError(
                    f"{option}={given!r} would be ignored: it is read with {other}={expected} and "
                    f"{other} is {setting!r}. Set {other}, or leave {option} out"
                )


def _refuse_smoothing(args: Any) -> None:
    if not args.label_smoothing_factor:
        return
    if not _is_a(args, {"SFTConfig"}) or args.loss_type != "nll":
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would be ignored: only SFT with "
            "loss_type='nll' smooths token labels; preference losses have label_smoothing"
        )


def _refuse_parallelism(parallelism: Any) -> None:
    for field in ("cp_size", "sp_size", "tp_size"):
        # Accelerate's launcher passes what its YAML says through the environment.
        launched = os.environ.get(f"PARALLELISM_CONFIG_{field.upper()}", 1)
        size = int(getattr(parallelism, field, None) or launched)
        if size > 1:
            raise ValueError(
                f"parallelism_config has {field}={size}; expected 1. It cuts rows or layers across "
                "devices, and the packed forward needs whole rows and whole layers. Use data "
                "parallelism or FSDP2 (fsdp=...)"
            )


def _check_liger(args: Any) -> None:
    if not args.use_liger_kernel:
        return
    if args.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel=True needs an accelerator and this run is on the CPU, where the "
            "layers are fused already; set it to False"
        )
    config = args.liger_kernel_config or {}
    if config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config asks for fused_linear_cross_entropy, which replaces the model's "
            "forward and with it the packed one; leave it out"
        )
    args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}


def _is_a(args: Any, names: set[str]) -> bool:
    """Whether `args` is of a config class of one of these names, TRL's or ours."""
    return any(cls.__name__ in names for cls in type(args).__mro__)


__all__ = ["refuse_options"]
