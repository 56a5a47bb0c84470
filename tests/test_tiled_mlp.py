"""Tiled MLPs and norms: the untiled results, and no tensor as wide as the intermediate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from fastpost import layers
from fastpost.tiled_mlp import TOKENWISE_MLPS, tile, tiled, untile

TOKENS, TILE, HIDDEN, INNER = 100, 16, 32, 160
COMMON = {
    "vocab_size": 97,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MODELS = ["llama", "qwen3", "gemma2", "phi3", "glm4", "granite"]


def build(kind: str = "llama", dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON | overrides)
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def gradients(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of fixed tokens."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, TOKENS // 2), generator=generator)
    torch.manual_seed(2)  # of dropout
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys() and len(one) > 1
    for name, expected in other.items():
        error = (one[name].double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm(), (name, error)


class Largest(TorchDispatchMode):
    """The largest size of a last but one dimension among tensors as wide as the intermediate."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths, self.rows = widths, 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] in self.widths:
                # weights and their gradients are as wide, and have HIDDEN rows
                rows = x.shape[:-1].numel()
                if rows != HIDDEN:
                    self.rows = max(self.rows, rows)
        return result


class Saved:
    """Bytes that autograd keeps for the backward, each storage once; parameters apart."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept: dict[int, tuple[int, Any]] = {}

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.hooks.__exit__(None, None, None)

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage.nbytes(), x
        return x

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.kept.values())

    @property
    def largest(self) -> int:
        return max(size for size, _ in self.kept.values())


@pytest.mark.parametrize("kind", MODELS)
def test_tiled_is_untiled(kind: str) -> None:
    """In float64 but for sums in another order, in every kind of MLP."""
    model = build(kind)
    expected = gradients(model)
    names = tile(model, TILE)
    assert sum(name.endswith(".mlp") for name in names) == 2
    assert_close(gradients(model), expected, 1e-12)
    untile(model)
    again = gradients(model)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_the_intermediate_never_exists() -> None:
    model = build()
    for tokens, rows in ((TOKENS, TOKENS), (TILE, 15)):  # 7 tiles of 15 and one of 10
        tile(model, tokens)
        with Largest(INNER) as largest:
            gradients(model)
        assert largest.rows == rows
        untile(model)


def test_what_is_kept_for_the_backward() -> None:
    """The largest tensor kept is as wide as a layer, where it was as wide as the intermediate."""
    model = build(dtype=torch.float32, vocab_size=HIDDEN)  # logits as narrow
    ids = torch.arange(3, 3 + 28).repeat(4)[None, :TOKENS]
    largest, total = [], []
    for tokens in (None, TILE):
        if tokens:
            tile(model, tokens)
        with Saved(model) as saved:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        largest.append(saved.largest)
        total.append(saved.bytes)
        hidden.sum().backward()
    assert largest == [TOKENS * INNER * 4, TOKENS * HIDDEN * 4]
    # gate, its SiLU, up and the product of each of two layers
    assert total[0] - total[1] >= 2 * 4 * TOKENS * INNER * 4


def count_forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda m, i, o: calls.append(o[..., 0].numel()))
    return calls


@pytest.mark.parametrize(
    ("kind", "forwards"),
    [("llama", 2), ("qwen3", 2), ("granite", 2), ("phi3", 2), ("gemma2", 3), ("glm4", 3)],
)
def test_in_a_checkpointed_layer_nothing_is_computed_twice_more(kind: str, forwards: int) -> None:
    """The layer's recomputation stops before the MLP, where no norm follows it."""
    model = build(kind)
    expected = gradients(model)
    tile(model, TILE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = count_forwards(model)
    assert_close(gradients(model), expected, 1e-12)
    assert sum(calls) == forwards * 2 * TOKENS and max(calls) <= TILE


def test_reentrant_checkpointing() -> None:
    model = build()
    expected = gradients(model)
    tile(model, TILE)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_close(gradients(model), expected, 1e-12)


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """Of 64 tiles the sum is as accurate as one product; added in bf16 it is not."""
    torch.manual_seed(0)
    net = nn.Linear(HIDDEN, 40, bias=False).to(torch.bfloat16)
    x = torch.randn(1, 1024, HIDDEN).bfloat16()
    grad = torch.randn(1, 1024, 40).bfloat16()
    exact = grad[0].double().T @ x[0].double()

    def error(tokens: int) -> float:
        net.zero_grad()
        tiled(net, net, x, tokens).backward(grad)
        return float((net.weight.grad.double() - exact).norm() / exact.norm())

    parts = [(g.T @ a) for g, a in zip(grad[0].split(16), x[0].split(16), strict=True)]
    in_bf16 = torch.zeros_like(exact, dtype=torch.bfloat16)
    for part in parts:
        in_bf16 += part
    rounded = float((in_bf16.double() - exact).norm() / exact.norm())
    assert error(16) <= 1.5 * error(1024) + 1e-4 < rounded / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_forwards_stay_within(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MIN_GATE_ELEMENTS", 1)
    monkeypatch.setattr(layers, "_MIN_NORM_ELEMENTS", 1)
    model = build(dtype=dtype)
    attached = layers.attach(model)
    expected = gradients(model)
    names = tile(model, TILE)
    assert names and set(names) < set(attached) and not any("norm" in name for name in names)
    swiglu, runs = layers.swiglu, []
    monkeypatch.setattr(layers, "swiglu", lambda *x: (runs.append(x[0].shape), swiglu(*x))[1])
    assert_close(gradients(model), expected, 1e-5 if dtype == torch.float32 else 2e-2)
    assert len(runs) == 2 * 2 * 7 and runs[0] == (1, 15, INNER)
    assert_close(gradients(copy.deepcopy(model)), expected, 2e-2)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}])
def test_adapters(options: dict[str, Any]) -> None:
    """Frozen weights get no gradient, and dropout draws the same masks twice."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    model = get_peft_model(build(dtype=torch.float32), lora)
    layers.attach(model)
    if "lora_dropout" not in options:
        expected = gradients(model)
        tile(model, TILE)
        assert_close(gradients(model), expected, 1e-4)
        return
    tile(model, TILE)
    ours = gradients(model)
    # Masks of tiles are not those of the whole: the truth is a difference quotient.
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    weight = dict(model.named_parameters())[name]
    step = 1e-2 * ours[name] / ours[name].norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step
            losses.append(gradients_loss(model))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(ours[name].norm()), rel=2e-2)


def gradients_loss(model: nn.Module) -> float:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, TOKENS // 2), generator=generator)
    torch.manual_seed(2)
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def test_autocast() -> None:
    """fp32 weights multiplied in bf16; the backward runs outside of autocast."""
    model = build(dtype=torch.float32)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        ids = torch.arange(3, 3 + 64)[None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = run()
    tile(model, TILE)
    kinds = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: kinds.add(o.dtype))
    ours = run()
    assert kinds == {torch.bfloat16}
    assert_close(ours, expected, 2e-2)


def test_without_gradients_tiles_are_only_computed() -> None:
    model = build()
    ids = torch.arange(3, 3 + 64)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        tile(model, TILE)
        calls = count_forwards(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert calls == [16] * 8


def test_a_hook_on_a_weight_fires_once() -> None:
    model = build()
    tile(model, TILE)
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    gradients(model)
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def test_eager_norms_keep_less() -> None:
    """transformers' RMSNorm in bf16 keeps 6 bytes an element more than its input; tiled, none."""
    model = build(dtype=torch.bfloat16)
    norm = model.model.norm
    x = torch.randn(1, TOKENS, HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    found, kept = [], []
    for tokens in (None, TILE):
        if tokens:
            assert {"model.norm", "model.layers.0.input_layernorm"} <= set(tile(model, tokens))
        x.grad = norm.weight.grad = None
        with Saved(model) as saved:
            y = norm(x)
        kept.append(saved.bytes - saved.kept.get(x.untyped_storage().data_ptr(), (0, None))[0])
        y.backward(grad)
        found.append({"y": y.detach(), "x": x.grad, "weight": norm.weight.grad})
    assert kept[0] >= 6 * TOKENS * HIDDEN and kept[1] == 0
    assert torch.equal(found[0]["y"], found[1]["y"]) and torch.equal(found[0]["x"], found[1]["x"])
    assert_close(found[1], found[0], 1e-2)


def test_a_fused_norm_keeps_its_input_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why it is not tiled."""
    monkeypatch.setattr(layers, "_MIN_NORM_ELEMENTS", 1)
    model = build(dtype=torch.bfloat16)
    layers.attach(model)
    x = torch.randn(1, TOKENS, HIDDEN).bfloat16().requires_grad_()
    with Saved(model) as saved:
        model.model.norm(x)
    assert saved.bytes <= x.nbytes + 4 * TOKENS
    assert not any("norm" in name for name in tile(model, TILE))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tile(build(), 0)
    experts = build(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        mlp_only_layers=[0],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layer 1 .*Qwen3MoeSparseMoeBlock.*leave the option out"):
        tile(experts, 8)
    assert not any("_tile_tokens" in m.__dict__ for m in experts.modules())


def test_known_mlps_exist() -> None:
    import importlib

    for module, name in TOKENWISE_MLPS:
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)
