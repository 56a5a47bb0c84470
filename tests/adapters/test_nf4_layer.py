"""The 4-bit layer against the dense layer with the unpacked weight, alone and under PEFT."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastpost import layers
from fastpost.adapted_layers import unfused_adapters
from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.backbone import FastpostWarning
from fastpost_kernels import nf4_dequantize, nf4_quantize
from tests.trainers.conftest import tiny_model

FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(3, 67).view(2, 32)


def layer_of(
    outputs: int = 48, inputs: int = 64, dtype: torch.dtype = FP32, **options: Any
) -> Nf4Linear:
    bias = nn.Parameter(torch.randn(outputs, dtype=dtype), requires_grad=False)
    weight = nf4_quantize(torch.randn(outputs, inputs), **options)
    return Nf4Linear(weight, bias, compute_dtype=dtype)


def dense_twin(model: nn.Module) -> Any:
    """The model with dense layers of the unpacked weights."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, Nf4Linear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense = dense.to(module.compute_dtype).requires_grad_(False)
            dense.weight.data = module.dequantize()
            if module.bias is not None:
                dense.bias.data = module.bias.data.clone()
            twin.set_submodule(path, dense)
    return twin


def quantized_model(dtype: torch.dtype = FP32, **options: Any) -> Any:
    model = tiny_model(97, attention_bias=True).to(dtype)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
            weight = nf4_quantize(module.weight.data, **options)
            model.set_submodule(path, Nf4Linear(weight, module.bias, compute_dtype=dtype))
    return model.requires_grad_(False)


def adapted(model: Any, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    torch.manual_seed(2)
    peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    for name, parameter in peft.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape))
    return peft


def run(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), **grads}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 10
    for name, tensor in wanted.items():
        error = (found[name].float() - tensor.float()).norm()
        assert error <= rtol * tensor.float().norm() + 1e-7, name
        assert tensor.any(), name


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"storage": BF16}])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_is_the_dense_layer_of_the_unpacked_weight(dtype, options) -> None:
    layer = layer_of(dtype=dtype, **options)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    dense = nn.functional.linear(x.detach(), layer.dequantize(), layer.bias)
    torch.testing.assert_close(y, dense)
    gradient = layer.dequantize().sum(0).expand(2, 5, 64)
    torch.testing.assert_close(x.grad, gradient, atol=0.05 if dtype == BF16 else 1e-4, rtol=0.02)
    assert isinstance(layer, nn.Linear) and y.dtype == dtype
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_computes_in_its_dtype_and_under_autocast_in_that_one() -> None:
    layer = layer_of(dtype=BF16)
    x = torch.randn(3, 64)
    assert layer(x).dtype == FP32
    torch.testing.assert_close(layer(x), layer(x.to(BF16)).float(), rtol=0, atol=0)
    layer = layer_of(dtype=FP32)
    with torch.autocast("cpu", BF16):
        assert layer(x).dtype == BF16


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_casts_change_the_dtype_it_computes_in_and_no_bytes(storage) -> None:
    layer = layer_of(storage=storage)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    for cast, dtype in ((nn.Module.bfloat16, BF16), (nn.Module.half, torch.float16)):
        cast(layer)
        assert layer.compute_dtype == dtype == layer.bias.dtype == layer.weight.dtype
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    layer.to("cpu", FP32)
    assert layer.packed.dtype == storage and layer.absmax.dtype == torch.uint8
    for name, tensor in before.items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    with pytest.raises(TypeError, match="computes in"):
        layer.double()


def test_bytes_cast_behind_its_back_are_refused() -> None:
    layer = layer_of(storage=BF16)
    layer.packed.data = layer.packed.data.half()
    with pytest.raises(TypeError, match="which destroys them"):
        layer(torch.randn(2, 64))


def test_moves_to_the_meta_device_and_out_of_it() -> None:
    layer = layer_of()
    state = layer.state_dict()
    layer.to("meta")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    layer.to_empty(device="cpu").load_state_dict(state)
    x = torch.randn(3, 64)
    torch.manual_seed(0)
    assert torch.equal(layer(x), layer_of()(x))


def test_copies_and_pickles() -> None:
    layer = layer_of()
    x = torch.randn(3, 64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.packed.data_ptr() != layer.packed.data_ptr()


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"storage": BF16}])
def test_state_dict_has_the_keys_of_bitsandbytes_and_loads(options) -> None:
    layer = layer_of(**options)
    state = nn.ModuleDict({"a": layer}).state_dict()
    nested = {"a.weight.nested_absmax", "a.weight.nested_quant_map"}
    plain = {"a.weight", "a.bias", "a.weight.absmax", "a.weight.quant_map"}
    plain.add("a.weight.quant_state.bitsandbytes__nf4")
    assert set(state) == (plain if "double_quant" in options else plain | nested)
    other = nn.ModuleDict({"a": layer_of(**options)})
    x = torch.randn(3, 64)
    assert not torch.equal(other["a"](x), layer(x))
    other.load_state_dict(state)
    assert torch.equal(other["a"](x), layer(x))
    with pytest.raises(RuntimeError, match=r"a\.weight is \(48, 64\)"):
        nn.ModuleDict({"a": layer_of(64, 48, **options)}).load_state_dict(state)
    del state["a.weight.absmax"]
    state["a.weight.absmin"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"Missing[\s\S]*absmax[\s\S]*Unexpected[\s\S]*absmin"):
        other.load_state_dict(state)


def test_weight_reads_as_the_dense_matrix() -> None:
    layer = layer_of()
    weight = layer.weight
    assert weight.shape == (48, 64) and weight.dtype == FP32 and weight.device.type == "cpu"
    assert torch.equal(weight + 0, layer.dequantize())
    assert type(weight.t()) is Tensor
    assert torch.equal(weight.to(BF16), layer.dequantize().to(BF16))
    with pytest.raises(RuntimeError, match="temporary copy"):
        weight.add_(1)


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_assigning_to_its_data_quantises(storage) -> None:
    layer = layer_of(storage=storage)
    wanted = torch.randn(48, 64)
    with pytest.warns(FastpostWarning, match="rounded to 4 bits"):
        layer.weight.data = wanted
    assert torch.equal(layer.dequantize(), nf4_dequantize(nf4_quantize(wanted), FP32))
    with pytest.raises(ValueError, match=r"\[48, 64\], got \(64, 48\)"):
        layer.requantize(wanted.t())


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_get_the_gradients_of_the_dense_model(use_dora, is_fused) -> None:
    model = quantized_model()
    wanted = run(adapted(dense_twin(model), use_dora=use_dora))
    ours = adapted(model, use_dora=use_dora)
    if is_fused:
        assert layers.attach(ours)
        assert not unfused_adapters(ours)
    assert_same(run(ours), wanted)
    if is_fused:
        assert_same(run(ours), wanted)  # with norms kept


def test_adapters_in_bfloat16() -> None:
    model = quantized_model(BF16)
    wanted = run(adapted(dense_twin(model), use_dora=True))
    ours = adapted(model, use_dora=True)
    assert {p.dtype for n, p in ours.named_parameters() if "lora" in n} == {FP32}
    layers.attach(ours)
    assert_same(run(ours), wanted, rtol=0.1)


def test_dora_begins_at_the_norms_of_the_unpacked_weight() -> None:
    model = quantized_model()
    norm = model.model.layers[0].mlp.up_proj.dequantize().norm(dim=1)
    before = model(IDS).logits
    peft = get_peft_model(model, LoraConfig(use_dora=True, target_modules="all-linear"))
    layer = peft.base_model.model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, norm)
    for is_fused in (False, True):
        if is_fused:
            layers.attach(peft)
        torch.testing.assert_close(peft(input_ids=IDS).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_quantises_the_merged_weight(use_dora, safe) -> None:
    model = quantized_model()
    dense = adapted(dense_twin(model), use_dora=use_dora)
    ours = adapted(model, use_dora=use_dora)
    layers.attach(ours)
    dense.merge_adapter(safe_merge=safe)
    with pytest.warns(FastpostWarning, match="rounded to 4 bits"):
        ours.merge_adapter(safe_merge=safe)
    for path, layer in ours.named_modules():
        if isinstance(layer, Nf4Linear):
            exact = dense.get_submodule(path).weight.data
            wanted = nf4_dequantize(nf4_quantize(exact), FP32)
            # a value on the border of two levels may fall to either
            differs = (layer.dequantize() - wanted).abs() > 1e-4
            assert differs.float().mean() < 1e-3
    with pytest.warns(FastpostWarning, match="does not restore"):
        ours.unmerge_adapter()
    assert not unfused_adapters(ours)


def test_a_new_weight_gives_dora_new_norms() -> None:
    peft = adapted(quantized_model(), use_dora=True)
    layers.attach(peft)
    run(peft)
    for module in peft.modules():
        if isinstance(module, Nf4Linear):
            module.requantize(2 * module.dequantize() + 0.1)
    assert_same(run(peft), run(dense_twin(peft)))


def test_checkpointing_and_generation() -> None:
    model = quantized_model()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    prompt = IDS[:1, :5]
    wanted = dense_twin(model).generate(prompt, **greedy)
    assert torch.equal(model.generate(prompt, **greedy), wanted)
    peft = adapted(model, use_dora=True)
    layers.attach(peft)
    plain = run(peft.train())
    peft.enable_input_require_grads()
    peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(run(peft), plain)
