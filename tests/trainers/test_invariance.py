"""The same samples give the same gradient however they are cut into batches."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpost
from tests.trainers.conftest import tiny_model


def gradient(run_trainer, trainer_class, config_class, model, dataset, options=None, **config):
    """Gradient of one optimizer step over the whole data set, in float64."""
    trainer = run_trainer(
        trainer_class,
        config_class,
        copy.deepcopy(model).double(),
        dataset,
        trainer_options=options,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-9,
        **config,
    )
    return trainer.trace.gradients


def assert_equal_gradients(one, other, rtol=1e-6) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        assert one[name].dtype == torch.float64
        assert (one[name] - other[name]).norm() <= rtol * one[name].norm() + 1e-12, name


SPLITS = {
    "micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "one-by-one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},
    "no-sharing": {"per_device_train_batch_size": 12, "prefix_sharing": False},
    "small-head-workspace": {"per_device_train_batch_size": 12, "memory_budget_gb": 1e-5},
    "padded-to-64": {"per_device_train_batch_size": 12, "pad_to_multiple_of": 64},
    "checkpointing": {"per_device_train_batch_size": 12, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_sft(split, tokenizer, prompt_completion_data, run_trainer) -> None:
    model, data = tiny_model(len(tokenizer)), prompt_completion_data.select(range(12))
    classes = fastpost.SFTTrainer, fastpost.SFTConfig
    whole = gradient(run_trainer, *classes, model, data, per_device_train_batch_size=12)
    assert_equal_gradients(whole, gradient(run_trainer, *classes, model, data, **split))


def test_sft_packed_rows(tokenizer, prompt_completion_data, run_trainer) -> None:
    model, data = tiny_model(len(tokenizer)), prompt_completion_data.select(range(12))
    classes = fastpost.SFTTrainer, fastpost.SFTConfig
    whole = gradient(run_trainer, *classes, model, data, per_device_train_batch_size=12)
    packed = gradient(
        run_trainer,
        *classes,
        model,
        data,
        packing=True,
        max_length=512,
        per_device_train_batch_size=12,
    )
    assert_equal_gradients(whole, packed)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_dpo(split, tokenizer, preference_data, run_trainer) -> None:
    model, data = tiny_model(len(tokenizer)), preference_data.select(range(12))
    options = {"ref_model": tiny_model(len(tokenizer), seed=1).double()}
    classes = fastpost.DPOTrainer, fastpost.DPOConfig
    whole = gradient(run_trainer, *classes, model, data, options, per_device_train_batch_size=12)
    other = gradient(run_trainer, *classes, model, data, options, **split)
    assert_equal_gradients(whole, other)


def test_order_of_rows(tokenizer, preference_data, run_trainer) -> None:
    model, data = tiny_model(len(tokenizer)), preference_data.select(range(12))
    options = {"ref_model": tiny_model(len(tokenizer), seed=1).double()}
    classes = fastpost.DPOTrainer, fastpost.DPOConfig
    config = {"per_device_train_batch_size": 12}
    whole = gradient(run_trainer, *classes, model, data, options, **config)
    reversed_data = data.select(list(reversed(range(12))))
    assert_equal_gradients(
        whole, gradient(run_trainer, *classes, model, reversed_data, options, **config)
    )


def test_other_samples_give_another_gradient(tokenizer, preference_data, run_trainer) -> None:
    model = tiny_model(len(tokenizer))
    options = {"ref_model": tiny_model(len(tokenizer), seed=1).double()}
    classes = fastpost.DPOTrainer, fastpost.DPOConfig
    config = {"per_device_train_batch_size": 12}
    one = gradient(
        run_trainer, *classes, model, preference_data.select(range(12)), options, **config
    )
    other = gradient(
        run_trainer, *classes, model, preference_data.select(range(1, 13)), options, **config
    )
    with pytest.raises(AssertionError):
        assert_equal_gradients(one, other)
