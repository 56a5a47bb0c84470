"""Fields of `transformers.TrainingArguments`: known, and right under our forward or refused.

`transformers.Trainer` reads them, around the model. Those that act on the forward are refused where
it cannot honour them, and otherwise compared with TRL's own trainers.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from accelerate import ParallelismConfig

import fastpost
from tests.trainers import footprint, methods
from tests.trainers.methods import METHODS
from tests.trainers.option_probes import EVALUATION, Changes, SameRun
from tests.trainers.option_runs import Runs

# Read by `transformers.Trainer` around the model: data, optimizer, schedule, saving, logging, the
# Hub, processes, devices.
AROUND_THE_MODEL = set(
    """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon batch_eval_metrics data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay
    eval_do_concat_batches eval_on_start eval_steps eval_use_gather_object fp16 fp16_full_eval
    greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token ignore_data_skip include_for_metrics label_names learning_rate length_column_name
    load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
    logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    lr_scheduler_kwargs lr_scheduler_type max_steps metric_for_best_model num_train_epochs
    optim optim_args optim_target_modules output_dir per_device_eval_batch_size
    per_device_train_batch_size prediction_loss_only project push_to_hub remove_unused_columns
    report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit
    skip_memory_metrics tf32 torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id use_cpu warmup_steps weight_decay
    """.split()  # noqa: SIM905
)

CONSUMED = {
    "activation_checkpointing": Changes("layers", True),
    "activation_checkpointing_kwargs": Changes(
        "layers", {"every_n_layers": 2}, {"activation_checkpointing": True}
    ),
    "bf16": Changes("gradients", True),
    "eval_strategy": Changes("metrics", "steps", {"eval_steps": 1}, "evaluates"),
    "gradient_accumulation_steps": Changes("batches", 2),
    "gradient_checkpointing": Changes("layers", True),
    "include_num_input_tokens_seen": Changes("metrics", True),
    "max_grad_norm": Changes("gradients", 0.01),
    "seed": Changes("batches", 8),
    "train_sampling_strategy": Changes("batches", "sequential"),
    "use_cache": SameRun(True, "a training forward keeps no cache"),
}

# Shown by tests of their own, here or elsewhere.
ELSEWHERE = {
    "auto_find_batch_size": "test_smaller_batch_when_memory_runs_out",
    "average_tokens_across_devices": "test_distributed.py",
    "bf16_full_eval": "test_evaluation_equals_trl",
    "full_determinism": "test_deterministic_algorithms",
    "gradient_checkpointing_kwargs": "test_parity.py",
    "label_smoothing_factor": "test_token_smoothing_equals_trl",
    "fsdp": "refused by transformers in one process",
    "fsdp_config": "goes with fsdp",
    "deepspeed": "refused by `engine_config`",
}

REFUSED = {
    "neftune_noise_alpha": 5.0,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "parallelism_config": ParallelismConfig(tp_size=2),
}
# A method with token losses and one with sequence losses and a reference.
BOTH_KINDS = ["SFT", pytest.param("DPO", marks=pytest.mark.slow)]
GOES_WITH_LIGER = {"liger_kernel_config"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("inherited"))


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    """`TrainingArguments` writes what torch_compile says into the environment."""
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])
    yield
    for name in [n for n in os.environ if n.startswith("ACCELERATE_DYNAMO")]:
        del os.environ[name]


def test_every_training_argument_is_known() -> None:
    fields = {f.name for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    groups = [AROUND_THE_MODEL, CONSUMED.keys(), ELSEWHERE.keys(), REFUSED.keys(), GOES_WITH_LIGER]
    assert fields == set().union(*groups)
    assert sum(map(len, groups)) == len(fields)


@pytest.mark.parametrize("name", BOTH_KINDS)
@pytest.mark.parametrize("option", CONSUMED)
def test_option_acts_through_our_forward(name, option, runs) -> None:
    probe = CONSUMED[option]
    setup = getattr(probe, "setup", "plain")
    one = runs.footprint(name, setup, dict(probe.under))
    other = runs.footprint(name, setup, {**probe.under, option: probe.value})
    found = footprint.differing(one, other)
    assert probe.facet in found if isinstance(probe, Changes) else not found


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("name", METHODS)
def test_option_is_refused(name, option, tmp_path) -> None:
    method = METHODS[name]
    with pytest.raises(ValueError, match=option.removesuffix("_backend").removesuffix("_mode")):
        settings = methods.settings_of(method, tmp_path, **{option: REFUSED[option]})
        methods.build_trainer(method, settings, method.model())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "SFT"])
def test_token_smoothing_is_refused_where_nothing_smooths(name, tmp_path) -> None:
    method = METHODS[name]
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        settings = methods.settings_of(method, tmp_path, label_smoothing_factor=0.1)
        methods.build_trainer(method, settings, method.model())


@pytest.mark.parametrize("loss_type", ["dft"])
def test_token_smoothing_is_refused_beside_another_loss(loss_type, tmp_path) -> None:
    method = METHODS["SFT"]
    settings = methods.settings_of(
        method, tmp_path, label_smoothing_factor=0.1, loss_type=loss_type
    )
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        methods.build_trainer(method, settings, method.model())


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_samplers_of_groups_are_not_replaced(name, tmp_path) -> None:
    method = METHODS[name]
    settings = methods.settings_of(method, tmp_path, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="train_sampling_strategy"):
        methods.build_trainer(method, settings, method.model())


def test_context_parallelism_of_the_launcher_is_refused(tmp_path, monkeypatch) -> None:
    method = METHODS["SFT"]
    settings = methods.settings_of(method, tmp_path)
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(ValueError, match="cp_size=2"):
        methods.build_trainer(method, settings, method.model())


def trained(name: str, folder: Path, library: Any, **config: Any) -> Any:
    """A trainer of ours or of TRL's, trained from the same weights on the same rows."""
    method = METHODS[name]
    evaluates = config.pop("evaluates", False)
    options = method.options(torch.float32)
    if evaluates:
        options["eval_dataset"] = method.data()
        options["compute_metrics"] = mean_of_predictions
    trainer = methods.build_trainer(
        method,
        methods.settings_of(method, folder / library.__name__, **config),
        method.model(),
        library=library,
        **options,
    )
    trainer.train()
    return trainer


def mean_of_predictions(evaluation: Any) -> dict[str, float]:
    logits = evaluation.predictions
    return {"mean_logit": float(np.mean([np.mean(part[part != -100]) for part in logits]))}


def assert_same_history(ours: Any, stock: Any) -> None:
    clocks = ("time", "per_second", "flos")
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            if not any(clock in key for clock in clocks):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-4, rel=1e-4), key


def assert_same_gradients(ours: Any, stock: Any) -> None:
    for name, gradient in stock.trace.gradients.items():
        error = (ours.trace.gradients[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-7, name


def test_token_smoothing_equals_trl(tmp_path) -> None:
    config = {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 2}
    ours = trained("SFT", tmp_path, fastpost, **config)
    stock = trained("SFT", tmp_path, trl, **config)
    assert_same_gradients(ours, stock)
    assert_same_history(ours, stock)
    plain = trained("SFT", tmp_path, fastpost, gradient_accumulation_steps=2)
    with pytest.raises(AssertionError):
        assert_same_gradients(ours, plain)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_evaluation_equals_trl(name, tmp_path) -> None:
    """Evaluation losses, metrics of a user's function, and evaluation with the weights in bf16."""
    config = {**EVALUATION, "per_device_eval_batch_size": 3, "evaluates": True}
    ours = trained(name, tmp_path, fastpost, **config)
    stock = trained(name, tmp_path, trl, **config)
    assert any("eval_mean_logit" in logs for logs in ours.state.log_history)
    assert_same_history(ours, stock)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_evaluation_in_bf16_equals_trl(name, tmp_path) -> None:
    found = []
    for library in (fastpost, trl):
        method = METHODS[name]
        settings = methods.settings_of(method, tmp_path, bf16_full_eval=True)
        trainer = methods.build_trainer(
            method,
            settings,
            method.model(),
            library=library,
            eval_dataset=method.data(),
            **method.options(torch.float32),
        )
        found.append(trainer.evaluate())
        assert trainer.model.dtype == torch.bfloat16
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=2e-2)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_smaller_batch_when_memory_runs_out(name, tmp_path, monkeypatch) -> None:
    """`auto_find_batch_size` starts again with our forward still in place."""
    method = METHODS[name]
    settings = methods.settings_of(method, tmp_path, auto_find_batch_size=True)
    trainer = methods.build_trainer(method, settings, method.model())
    step, sizes = trainer.training_step, []

    def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    trainer.train()
    assert sizes[1] < sizes[0]
    assert trainer.engine.packed_forwards and not trainer.engine.fallbacks


def test_deterministic_algorithms(tmp_path) -> None:
    """`full_determinism` finds no operation of ours that could differ from run to run."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        trainer = trained("DPO", tmp_path, fastpost, full_determinism=True)
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same_gradients(trainer, trained("DPO", tmp_path, fastpost))
