"""What each field of a method's configuration must be seen to do.

One row per field that is not `transformers.TrainingArguments`' own. A field without a row fails a
test, so a new version of TRL cannot slip an option past us.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHAT_TEMPLATE_FILE = "<chat template file>"  # replaced by the test with files it wrote
SAVED_MODEL = "<saved model>"


@dataclass(frozen=True)
class Changes:
    """A run with the option differs in `facet` from the same run without it.

    Attributes:
        facet: of the footprint (`footprint.run`).
        value: given to the field.
        under: fields of both runs.
        setup: what both runs are built on (`test_options.SETUPS`).
        instead_of: the field in the other run, None for its default.
        along: fields that go with the value, in its run only.
    """

    facet: str
    value: Any
    under: dict[str, Any] = field(default_factory=dict)
    setup: str = "plain"
    instead_of: Any = None
    along: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """The option is refused when the trainer is made or used, with a message that names it."""

    value: Any
    message: str
    error: type[Exception] = ValueError
    under: dict[str, Any] = field(default_factory=dict)
    setup: str = "plain"


@dataclass(frozen=True)
class SameRun:
    """The option holds by construction: a run with it leaves the same footprint.

    Attributes:
        why: what makes it so.
    """

    value: Any
    why: str
    under: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownBy:
    """Another test shows it: `path::name`."""

    test: str


Probe = Changes | Refused | SameRun | ShownBy

ENGINE: dict[str, Probe] = {
    "prefix_sharing": Changes("engine", False),
    "memory_budget_gb": Changes("engine", 1e-3),
    "adapter": Changes("gradients", "best"),
    # of a run without an adapter; that it is obeyed is shown by tests/adapters/test_lora_plus.py
    "lora_plus_ratio": Refused(16.0, "trains no LoRA matrix B"),
    "optimizer": Changes("weights", "adamw_8bit", {"max_steps": 2}),
    # gone before anyone looks at them; that weights are the same: test_optimizer_in_backward.py
    "optimizer_in_backward": Changes("gradients", True),
    "mlp_tile_tokens": ShownBy("tests/trainers/test_memory_options.py::test_mlps_are_tiled"),
    "trial_step": ShownBy("tests/trainers/test_trial_step.py::test_a_trial_is_taken_back"),
}
NO_TRIAL: dict[str, Probe] = {"trial_step": Refused(True, "trial_step")}
LOADING: dict[str, Probe] = {
    "model_init_kwargs": Changes("calls", {"dtype": "bfloat16"}, setup="saved model"),
    "trust_remote_code": Changes("calls", True, setup="saved model"),
}
OFFLOADING: dict[str, Probe] = {
    "activation_offloading": Refused(True, "activation_offloading"),
}
REFERENCE: dict[str, Probe] = {
    "reference": Changes("batches", "cached"),
    "precompute_ref_log_probs": Changes("forwards", True),
    "precompute_ref_batch_size": Changes("forwards", 3, {"precompute_ref_log_probs": True}),
}
TWO_STEPS = {"max_steps": 2, "learning_rate": 0.01}
SYNC = {**TWO_STEPS, "sync_ref_model": True, "ref_model_sync_steps": 1}
SYNCED_REFERENCE: dict[str, Probe] = {
    "reference": Changes("batches", "cached"),
    "sync_ref_model": Changes("loss", True, TWO_STEPS, along={"ref_model_sync_steps": 1}),
    "ref_model_mixup_alpha": Changes("loss", 0.1, SYNC),
    "ref_model_sync_steps": Changes("loss", 2, SYNC),
}
EXPERTS: dict[str, Probe] = {
    "router_aux_loss_coef": Changes("loss", 0.5, setup="experts", instead_of=0.0),
}
DATASET_PROCESSES: dict[str, Probe] = {"dataset_num_proc": Changes("calls", 2)}
PADDING: dict[str, Probe] = {
    "pad_to_multiple_of": Changes("batches", 64),
    "max_length": Changes("batches", 48),
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1}

SFT: dict[str, Probe] = {
    **ENGINE,
    **LOADING,
    **OFFLOADING,
    **EXPERTS,
    **DATASET_PROCESSES,
    **PADDING,
    "chat_template_path": Changes("batches", CHAT_TEMPLATE_FILE),
    "dataset_text_field": Changes("batches", "other", {"max_length": 32}, setup="two texts"),
    "dataset_kwargs": Changes("calls", {"skip_prepare_dataset": True}, setup="tokenised"),
    "eos_token": Changes("batches", "!", {"max_length": 48}, setup="two texts"),
    "pad_token": Changes("batches", "!"),
    "truncation_mode": Changes("batches", "keep_end", {"max_length": 48}),
    "shuffle_dataset": Changes("batches", True),
    "packing": Changes("batches", True, {"max_length": 128}),
    "packing_strategy": Changes("batches", "wrapped", {"packing": True, "max_length": 96}),
    "padding_free": Changes("batches", True, {"max_length": None}),
    "eval_packing": Changes(
        "forwards",
        True,
        {"eval_strategy": "steps", "eval_steps": 1, "max_length": 128},
        "evaluates",
    ),
    "completion_only_loss": Changes("loss", False),
    "assistant_only_loss": Changes("batches", True, setup="messages"),
    "loss_type": Changes("loss", "dft"),
}

DPO: dict[str, Probe] = {
    **ENGINE,
    **LOADING,
    **OFFLOADING,
    **EXPERTS,
    **DATASET_PROCESSES,
    **PADDING,
    **REFERENCE,
    **SYNCED_REFERENCE,
    "disable_dropout": Changes("loss", False, setup="dropout"),
    "truncation_mode": Changes("batches", "keep_end", {"max_length": 60}),
    "padding_free": SameRun(True, "rows are always packed without padding"),
    "pad_token": Changes("batches", "!"),
    "loss_type": Changes("loss", "hinge"),
    "loss_weights": Changes("loss", [1.0, 0.3], {"loss_type": ["sigmoid", "sft"]}),
    "ld_alpha": Changes("loss", 0.3),
    "f_divergence_type": Changes("loss", "forward_kl"),
    "f_alpha_divergence_coef": Changes("loss", 0.9, {"f_divergence_type": "alpha_divergence"}),
    "label_smoothing": Changes("loss", 0.2, {"loss_type": "robust"}),
    "beta": Changes("loss", 0.3),
    "use_weighting": Changes("loss", True),
    "discopop_tau": Changes("loss", 0.5, {"loss_type": "discopop"}),
}

KTO: dict[str, Probe] = {
    **ENGINE,
    **NO_TRIAL,
    **LOADING,
    **OFFLOADING,
    **EXPERTS,
    **DATASET_PROCESSES,
    **PADDING,
    **REFERENCE,
    **SYNCED_REFERENCE,
    "disable_dropout": Changes("loss", False, setup="dropout"),
    "loss_type": Changes("forwards", "apo_zero_unpaired"),
    "beta": Changes("loss", 0.3),
    "desirable_weight": Changes("loss", 2.0),
    "undesirable_weight": Changes("loss", 2.0),
}

REFERENCE_FREE: dict[str, Probe] = {
    **ENGINE,
    **NO_TRIAL,
    **LOADING,
    **DATASET_PROCESSES,
    "max_length": Changes("batches", 48),
    "max_completion_length": Refused(4, "max_completion_length"),
    "disable_dropout": Changes("loss", False, setup="dropout"),
    "beta": Changes("loss", 0.3),
    "generate_during_eval": Refused(True, "generate_during_eval"),
    "is_encoder_decoder": Refused(True, "encoder"),
}

CPO: dict[str, Probe] = {
    **REFERENCE_FREE,
    "label_smoothing": Changes("loss", 0.2),
    "loss_type": Changes("loss", "hinge"),
    "cpo_alpha": Changes("loss", 0.5),
    "simpo_gamma": Changes("loss", 1.5, {"loss_type": "simpo"}),
    "alpha": Changes("loss", 0.5, {"loss_type": "alphapo"}),
}

ORPO: dict[str, Probe] = {
    **REFERENCE_FREE,
    "padding_value": Changes("forwards", 5),
}

NO_HEAD: dict[str, Probe] = {
    "prefix_sharing": ENGINE["prefix_sharing"],
    "memory_budget_gb": Refused(1.0, "memory_budget_gb"),
    "adapter": ENGINE["adapter"],
    "lora_plus_ratio": ENGINE["lora_plus_ratio"],
    "optimizer": ENGINE["optimizer"],
    "optimizer_in_backward": ENGINE["optimizer_in_backward"],
    "mlp_tile_tokens": ENGINE["mlp_tile_tokens"],
    "trial_step": ENGINE["trial_step"],
}

REWARD: dict[str, Probe] = {
    **NO_HEAD,
    **LOADING,
    **OFFLOADING,
    **DATASET_PROCESSES,
    "pad_to_multiple_of": Changes("batches", 128),
    "max_length": Changes("batches", 60),
    "chat_template_path": Changes("batches", CHAT_TEMPLATE_FILE),
    "eos_token": Changes("batches", "!", setup="text pairs"),
    "pad_token": Changes("batches", "!"),
    "disable_dropout": Changes("loss", False, setup="dropout"),
    "center_rewards_coefficient": Changes("loss", 0.5),
}

PRM: dict[str, Probe] = {
    **NO_HEAD,
    **NO_TRIAL,
    **DATASET_PROCESSES,
    "max_length": Changes("batches", 40),
    "step_separator": Changes("batches", "##"),
    "train_on_last_step_only": Changes("loss", True),
    "disable_dropout": Changes("loss", False, setup="dropout"),
}

PROBES: dict[str, dict[str, Probe]] = {
    "SFT": SFT,
    "DPO": DPO,
    "KTO": KTO,
    "CPO": CPO,
    "ORPO": ORPO,
    "Reward": REWARD,
    "PRM": PRM,
}
