"""The copy to sample from has the trained weights in its own dtype; the trained model keeps its."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh

import fastpost
from fastpost.rollout.cast_copy import CastCopy
from tests.trainers.conftest import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "saved-modules": LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["down_proj"], task_type="CAUSAL_LM"
    ),
}


def noisy_adapter(config: LoraConfig) -> torch.nn.Module:
    """A model whose adapters do something."""
    model = get_peft_model(tiny_model(64), copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_the_trained_model_keeps_its_weights_and_dtype() -> None:
    model = tiny_model(64).train()
    model.gradient_checkpointing_enable()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rolled = CastCopy("bfloat16").refresh(model)
    assert {p.dtype for p in rolled.parameters()} == {torch.bfloat16}
    assert not rolled.training and not rolled.is_gradient_checkpointing and rolled.config.use_cache
    assert model.training and model.is_gradient_checkpointing
    assert rolled.model.rotary_emb.inv_freq.dtype == torch.float32
    assert rolled.lm_head.weight is rolled.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
        assert torch.equal(rolled.get_parameter(name), before[name].bfloat16())
        assert parameter.data_ptr() != rolled.get_parameter(name).data_ptr()


def test_a_refresh_brings_the_new_weights_into_the_same_copy() -> None:
    model, holder = tiny_model(64), CastCopy("float32")
    engine = fastpost.accelerate_model(model)
    first = holder.refresh(model)
    storage = first.lm_head.weight.data_ptr()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert not torch.equal(first(IDS).logits, model(IDS).logits)
    assert holder.refresh(model) is first and first.lm_head.weight.data_ptr() == storage
    torch.testing.assert_close(first(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert engine.is_installed and "forward" not in first.__dict__


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters_are_merged_into_the_copy_alone(config) -> None:
    model = noisy_adapter(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rolled = CastCopy("float32").refresh(model)
    assert type(rolled) is type(model.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(rolled(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(rolled(IDS).logits, model(IDS).logits, atol=1e-2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_making_the_copy_draws_no_random_number() -> None:
    model = tiny_model(64)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    CastCopy("bfloat16").refresh(model)
    assert torch.equal(torch.rand(4), expected)


def test_sharded_weights_are_gathered(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model(64)
        expected = copy.deepcopy(model)
        torch.distributed.fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        rolled = CastCopy("float32").refresh(model)
        assert torch.equal(rolled(IDS).logits, expected(IDS).logits)
    finally:
        torch.distributed.destroy_process_group()


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout_dtype must be None or one of .* got 'int4'"):
        CastCopy("int4")
    quantised = tiny_model(64)
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="quantised model is too large"):
        CastCopy("bfloat16").refresh(quantised)
    tied = get_peft_model(tiny_model(64), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="tied to another weight"):
        CastCopy("bfloat16").refresh(tied)

    class Derived(type(quantised)):  # type: ignore[misc]
        """A class that its configuration does not lead to."""

    with pytest.raises(ValueError, match="configuration of Derived leads to LlamaForCausalLM"):
        CastCopy("bfloat16").refresh(Derived(tiny_model(64).config))
