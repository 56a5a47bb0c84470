"""Fused layers in every model they serve: equal to stock, and gone without a trace."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fastpost import layers

BF16, FP32 = torch.bfloat16, torch.float32

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
SPECIFIC: dict[str, dict[str, Any]] = {
    "cohere2": {},
    "deepseek_v3": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "glm4": {},
    "granite": {},
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE | {"mlp_only_layers": [0]},
    "smollm3": {},
}


@pytest.fixture(autouse=True)
def serve_tiny_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are below the sizes from which the fused passes gain."""
    monkeypatch.setattr(layers, "_MIN_NORM_ELEMENTS", 1)
    monkeypatch.setattr(layers, "_MIN_GATE_ELEMENTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each fused function ran."""
    counts = {"rms_norm": 0, "swiglu": 0}
    for name in counts:
        original = getattr(layers, name)

        def counting(*args: Any, _name: str = name, _original: Any = original) -> Tensor:
            counts[_name] += 1
            return _original(*args)

        monkeypatch.setattr(layers, name, counting)
    yield counts


def build(model_type: str = "llama", dtype: torch.dtype = FP32, **overrides: Any) -> Any:
    config = AutoConfig.for_model(model_type, **(COMMON | SPECIFIC[model_type] | overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    with torch.no_grad():  # norms start as ones, which would hide a forgotten weight
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def run(model: nn.Module, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients of a fixed projection of them."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 97, (2, 11), generator=generator)
    model.zero_grad()
    logits = model(input_ids=input_ids, use_cache=False).logits
    (logits.float() * torch.randn(logits.shape, generator=generator)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Relative to the largest entry of each tensor."""
    assert got[1].keys() == expected[1].keys()
    pairs = {"logits": (got[0], expected[0])}
    pairs |= {name: (got[1][name], expected[1][name]) for name in expected[1]}
    for name, (ours, stock) in pairs.items():
        error = (ours.double() - stock.double()).abs().max()
        assert error <= tolerance * stock.abs().max() + 1e-12, f"{name}: {error:.3g}"


def dicts(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


def classes_of(model: nn.Module) -> set[tuple[str, str]]:
    return {(type(m).__module__, type(m).__qualname__) for m in model.modules()}


@pytest.mark.parametrize("model_type", SPECIFIC)
def test_logits_and_gradients_equal_stock(model_type: str, calls: dict[str, int]) -> None:
    model = build(model_type)
    expected, before = run(model), dicts(model)
    attached = layers.attach(model)
    served = layers.RMS_NORMS | layers.GATED_MLPS
    known = {(type(m).__module__, type(m).__qualname__): n for n, m in model.named_modules()}
    assert {known[name] for name in served & known.keys()} <= set(attached) and attached
    assert_same(run(model), expected, 1e-5)
    chains = [n for n in attached if type(model.get_submodule(n)) is not nn.Linear]
    assert sum(calls.values()) >= len(chains) - 1  # an expert may get no token
    layers.detach(model)
    assert dicts(model) == before


def test_every_class_is_in_a_model_above() -> None:
    found: set[tuple[str, str]] = set()
    for model_type in SPECIFIC:
        with torch.device("meta"):
            config = AutoConfig.for_model(model_type, **(COMMON | SPECIFIC[model_type]))
            found |= classes_of(AutoModelForCausalLM.from_config(config))
    assert found >= layers.RMS_NORMS | layers.GATED_MLPS


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_bf16_rounds_where_stock_rounds(model_type: str) -> None:
    model = build(model_type, BF16)
    expected = run(model)
    truth = run(copy.deepcopy(model).float())
    layers.attach(model)
    got = run(model)
    # One last place in a layer changes what follows; so each is judged by its distance to fp32.
    for name, exact in {"logits": truth[0], **truth[1]}.items():
        ours, stock = (r[0] if name == "logits" else r[1][name] for r in (got, expected))
        errors = [(t.float() - exact).norm() / exact.norm() for t in (ours, stock)]
        assert errors[0] <= 1.2 * errors[1] + 2**-8, f"{name}: {errors}"


def test_autocast_equals_stock(calls: dict[str, int]) -> None:
    """fp32 norms around bf16 products, and bf16 gates."""
    model = build()
    with torch.autocast("cpu", dtype=BF16):
        expected = run(model)
        layers.attach(model)
        assert_same(run(model), expected, 2e-2)
    assert min(calls.values()) > 0


def test_what_cannot_be_served_runs_the_class(calls: dict[str, int]) -> None:
    """float64, and a norm whose weight has another dtype, as some recipes keep it."""
    model = build(dtype=torch.float64)
    expected = run(model)
    layers.attach(model)
    assert_same(run(model), expected, 0.0)
    norm = LlamaRMSNorm(64)
    hidden = torch.randn(3, 64, dtype=BF16)
    stock = norm(hidden)
    layers.attach(norm)
    assert stock.dtype == norm(hidden).dtype == FP32 and torch.equal(norm(hidden), stock)
    assert calls == {"rms_norm": 0, "swiglu": 0}


def test_small_calls_run_the_class(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = build()
    layers.attach(model)
    run(model)
    assert calls == {"rms_norm": 0, "swiglu": 0}


def test_other_activations_and_forwards_are_left_alone() -> None:
    gelu = build(hidden_act="gelu")
    assert not any(name.endswith("mlp") for name in layers.attach(gelu))
    model = build()
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    own = lambda hidden: hidden  # noqa: E731
    norm.forward = own
    assert "model.norm" not in layers.attach(model)
    assert layers.attach(model) == []
    mlp.forward = own
    layers.detach(model)
    assert norm.forward is own and mlp.forward is own


def test_hooks_on_the_activation_still_run() -> None:
    config = AutoConfig.for_model("llama", **COMMON)
    mlp, seen = LlamaMLP(config), []
    layers.attach(mlp)
    mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    mlp(torch.randn(2, 64))
    assert seen == [1]


def test_a_deep_copy_uses_its_own_weights() -> None:
    model = build()
    layers.attach(model)
    expected = run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(run(model), expected, 0.0)
    assert not run(twin)[0].any()
    layers.detach(twin)
    assert all("forward" not in module.__dict__ for module in twin.modules())
    assert "forward" in model.model.norm.__dict__


def test_an_attached_model_can_be_saved_whole() -> None:
    model = build()
    layers.attach(model)
    expected = run(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(run(torch.load(file, weights_only=False)), expected, 1e-5)


@pytest.mark.parametrize("order", ["attach first", "adapters first"])
def test_lora_on_the_projections(order: str, calls: dict[str, int]) -> None:
    targets = ["gate_proj", "up_proj", "down_proj"]

    def adapted(with_layers: bool) -> nn.Module:
        model = build()
        if with_layers and order == "attach first":
            layers.attach(model)
        torch.manual_seed(3)
        peft = get_peft_model(
            model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        )
        if with_layers and order == "adapters first":
            layers.attach(peft)
        return peft

    expected = run(adapted(False))
    assert any("lora_A" in name and grad.any() for name, grad in expected[1].items())
    assert_same(run(adapted(True)), expected, 1e-5)
    assert min(calls.values()) > 0


def test_gradient_checkpointing_and_no_grad_and_generate() -> None:
    model = build()
    expected = run(model)
    prompt = torch.arange(3, 9)[None]
    text = model.eval().generate(prompt, max_new_tokens=4, do_sample=False)
    layers.attach(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), text)
    with torch.no_grad():
        assert not model(prompt).logits.requires_grad
    for use_reentrant in (False, True):
        model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        assert_same(run(model), expected, 1e-5)
    assert isinstance(model, PreTrainedModel)


def test_linear_layers_get_their_weight_gradient_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bf16, a tall weight that the fused gradient serves; deep copies keep their own."""
    module = importlib.import_module("fastpost_kernels.linear")
    monkeypatch.setattr(module, "_MIN_WORK", 1)
    monkeypatch.setattr(module, "has_matrix_unit", lambda: True)
    seen: list[Tensor] = []
    original = layers.linear
    monkeypatch.setattr(layers, "linear", lambda *a: (seen.append(a[1]), original(*a))[1])
    layer = nn.Linear(64, 192).to(BF16)
    x = torch.randn(2, 70, 64, dtype=BF16)
    layer(x).sum().backward()
    expected = layer.weight.grad
    assert layers.attach(layer) == [""]
    copied = copy.deepcopy(layer)
    for module in (layer, copied):
        module.zero_grad()
        module(x).sum().backward()
        torch.testing.assert_close(module.weight.grad, expected, rtol=2e-2, atol=2e-2)
        assert seen[-1] is module.weight
    layers.detach(layer)
    assert "forward" not in layer.__dict__

    class Other(nn.Linear):
        """Adapters and quantised layers are subclasses with forwards of their own."""

    assert layers.attach(Other(64, 192)) == []
