"""What each field of a configuration that samples completions must be seen to do."""

from __future__ import annotations

from tests.trainers.option_probes import (
    ENGINE,
    EVALUATION,
    EXPERTS,
    LOADING,
    NO_TRIAL,
    Changes,
    Probe,
    Refused,
    SameRun,
    ShownBy,
)

# Several steps on the same completions, so that the ratio leaves 1.
OFF_POLICY = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.01}
# A reference that the policy has left, and that follows it.
KL = {"beta": 0.5, "max_steps": 2, "learning_rate": 0.01}
SYNC = {**KL, "sync_ref_model": True, "ref_model_sync_steps": 1}

SAMPLING: dict[str, Probe] = {
    "temperature": Changes("forwards", 0.3),
    "top_p": Changes("forwards", 0.3),
    "top_k": Changes("forwards", 2),
    "min_p": Changes("forwards", 0.5),
    "repetition_penalty": Changes("forwards", 5.0),
    "generation_kwargs": Changes("forwards", {"num_beams": 2}),
    "cache_implementation": Refused("no such cache", "cache_implementation"),
}
ROLLOUT: dict[str, Probe] = {
    "rollout_dtype": Changes("metrics", "bfloat16"),
    "rollout_mismatch_limit": Changes("metrics", 10.0),
}
NO_DEEPSPEED: dict[str, Probe] = {
    "ds3_gather_for_generation": SameRun(False, "acts with DeepSpeed, which is refused"),
}
VLLM: dict[str, Probe] = {
    "use_vllm": Refused(True, "vLLM", ImportError),
    **{
        name: Refused(value, name)
        for name, value in {
            "vllm_mode": "server",
            "vllm_model_impl": "transformers",
            "vllm_enable_sleep_mode": True,
            "vllm_structured_outputs_regex": "a*",
            "vllm_server_base_url": "http://nowhere",
            "vllm_server_host": "127.0.0.1",
            "vllm_server_port": 1,
            "vllm_server_timeout": 1.0,
            "vllm_group_port": 1,
            "vllm_gpu_memory_utilization": 0.1,
            "vllm_tensor_parallel_size": 2,
        }.items()
    },
}

REFERENCE: dict[str, Probe] = {
    "reference": ShownBy("tests/trainers/test_reference_kinds.py::test_what_is_used_is_said"),
}

GROUPS: dict[str, Probe] = {
    **ENGINE,
    **REFERENCE,
    **LOADING,
    **EXPERTS,
    **SAMPLING,
    **ROLLOUT,
    **NO_DEEPSPEED,
    **VLLM,
    "vllm_max_model_length": Refused(64, "vllm_max_model_length"),
    "disable_dropout": Changes("gradients", True, setup="dropout"),
    "num_generations": Changes("forwards", 4),
    "num_generations_eval": Changes(
        "forwards", 4, {**EVALUATION, "per_device_eval_batch_size": 4}, "evaluates"
    ),
    "max_completion_length": Changes("forwards", 3),
    "shuffle_dataset": Changes("forwards", False),
    "pad_to_multiple_of": Changes("forwards", 32),
    "generation_batch_size": Changes("forwards", 8),
    "steps_per_generation": Changes("forwards", 2),
    "chat_template_kwargs": Changes("forwards", {"loud": True}),
    "num_iterations": Changes("forwards", 2, {"max_steps": 2}),
    "epsilon": Changes("loss", 1e-4, OFF_POLICY),
    "epsilon_high": Changes("loss", 0.5, {**OFF_POLICY, "epsilon": 1e-4}),
    "reward_weights": Changes("metrics", [2.0]),
    "mask_truncated_completions": Changes("gradients", True),
    "sync_ref_model": Changes("metrics", True, KL, along={"ref_model_sync_steps": 1}),
    "ref_model_mixup_alpha": Changes("metrics", 0.1, SYNC),
    "ref_model_sync_steps": Changes("metrics", 2, SYNC),
    "log_completions": Changes("printed", True),
    "num_completions_to_print": Changes("printed", 1, {"log_completions": True}),
    "log_unique_prompts": SameRun(True, "acts on the tables of wandb and trackio"),
    "log_multimodal": SameRun(False, "acts on images, and prompts are text"),
    "use_transformers_continuous_batching": ShownBy(
        "tests/rollout/test_transformers_rollout.py"
        "::test_continuous_batching_gives_one_completion_for_each_prompt"
    ),
    "use_transformers_paged": ShownBy(
        "tests/trainers/test_options.py::test_paged_is_the_old_name_of_continuous_batching"
    ),
    "transformers_continuous_batching_config": Refused(
        {"no_such_field": 1},
        "no_such_field",
        TypeError,
        {"use_transformers_continuous_batching": True},
    ),
}

SAPO = {**OFF_POLICY, "loss_type": "sapo"}
VESPO = {**OFF_POLICY, "loss_type": "vespo", "learning_rate": 3e-5}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.5, "max_steps": 2}
RISING = {**ADAPTIVE, "entropy_target": 100.0}

GRPO: dict[str, Probe] = {
    **GROUPS,
    "cast_lm_head_to_fp32": Changes("engine", True),
    "beta": Changes("metrics", 0.1),
    "delta": Changes("loss", 1.0001, {**OFF_POLICY, "epsilon": 0.9}),
    "sapo_temperature_neg": Changes("loss", 5.0, SAPO),
    "sapo_temperature_pos": Changes("loss", 5.0, SAPO),
    "vespo_k_pos": Changes("loss", 10.0, VESPO),
    "vespo_lambda_pos": Changes("loss", 1.0, VESPO),
    "vespo_k_neg": Changes("loss", 1.0, VESPO),
    "vespo_lambda_neg": Changes("loss", 1.0, VESPO),
    "importance_sampling_level": Changes("loss", "sequence", OFF_POLICY),
    "multi_objective_aggregation": Changes("gradients", "normalize_then_sum", {}, "two rewards"),
    "scale_rewards": Changes("gradients", "none"),
    "loss_type": Changes("loss", "sapo", OFF_POLICY),
    "top_entropy_quantile": Changes("gradients", 0.5),
    "entropy_coef": Changes("gradients", 0.1),
    "use_adaptive_entropy": Changes("metrics", True, {"entropy_coef": 0.5, "max_steps": 2}),
    "entropy_coef_min": Changes("metrics", 0.499, ADAPTIVE),
    "entropy_coef_max": Changes("metrics", 0.501, RISING),
    "entropy_coef_delta": Changes("metrics", 0.1, ADAPTIVE),
    "entropy_target": Changes("metrics", 100.0, ADAPTIVE),
    "max_tool_calling_iterations": SameRun(1, "counts calls of tools, and there are none"),
    "off_policy_mask_threshold": Changes("loss", 1e-9, OFF_POLICY),
    "use_bias_correction_kl": Changes("loss", False, {**OFF_POLICY, **KL}),
    "log_completions_hub_repo": Refused("someone/somewhere", "log_completions_hub_repo"),
    **{
        name: Refused(value, name)
        for name, value in {
            "vllm_importance_sampling_correction": False,
            "vllm_importance_sampling_mode": "token_mask",
            "vllm_importance_sampling_clip_max": 2.0,
            "vllm_importance_sampling_clip_min": 0.5,
            "vllm_importance_sampling_cap": 2.0,
        }.items()
    },
}

RLOO: dict[str, Probe] = {
    **GROUPS,
    "beta": Changes("metrics", 0.0, instead_of=0.05),
    "normalize_advantages": Changes("gradients", True),
    "reward_clip_range": Changes("gradients", [0.0, 0.2]),
}

ONLINE_DPO: dict[str, Probe] = {
    **ENGINE,
    **NO_TRIAL,
    "reference": ShownBy(
        "tests/trainers/test_reference_kinds.py::"
        "test_online_dpo_takes_a_second_model_beside_an_adapter"
    ),
    **LOADING,
    **SAMPLING,
    **ROLLOUT,
    **NO_DEEPSPEED,
    **VLLM,
    "reward_model_path": Refused("somewhere", "reward"),
    "max_new_tokens": Changes("forwards", 4),
    "max_length": Changes("forwards", 32),
    "missing_eos_penalty": Changes("metrics", 1.0),
    "beta": Changes("gradients", 0.5),
    "loss_type": Changes("gradients", "ipo"),
    "disable_dropout": Changes("gradients", False, setup="dropout"),
    "reward_weights": Changes("metrics", [2.0]),
}

PPO_REUSE = {"num_mini_batches": 2, "max_steps": 3, "learning_rate": 0.01}

PPO: dict[str, Probe] = {
    **ENGINE,
    **NO_TRIAL,
    **REFERENCE,
    "model_init_kwargs": LOADING["model_init_kwargs"],
    **ROLLOUT,
    "max_completion_length": Changes("forwards", 3),
    "temperature": SAMPLING["temperature"],
    "num_generations": Changes("forwards", 1),
    "num_ppo_epochs": Changes("forwards", 1, {"max_steps": 2}),
    "num_mini_batches": Changes("forwards", 2),
    "kl_coef": Changes(
        "metrics", 0.5, {"max_steps": 3, "num_ppo_epochs": 1, "learning_rate": 0.01}
    ),
    "kl_target": Changes("metrics", 1e-3, {"max_steps": 3, "num_ppo_epochs": 1}),
    "kl_horizon": Changes("metrics", 100, {"max_steps": 3, "num_ppo_epochs": 1, "kl_target": 1e-3}),
    "gamma": Changes("gradients", 0.5),
    "lam": Changes("gradients", 0.5),
    "cliprange": Changes("loss", 1e-4, PPO_REUSE),
    "cliprange_value": Changes("loss", 1e-4, PPO_REUSE),
    "vf_coef": Changes("gradients", 1.0),
    "entropy_coef": Changes("gradients", 0.1),
    "whiten_rewards": Changes("gradients", True),
    "missing_eos_penalty": Changes("gradients", 1.0),
    "reward_weights": Changes("gradients", [2.0]),
}

PROBES: dict[str, dict[str, Probe]] = {
    "GRPO": GRPO,
    "RLOO": RLOO,
    "OnlineDPO": ONLINE_DPO,
    "PPO": PPO,
}
