"""PEFT's layers on fused kernels: equal to PEFT's own in every state they can be in."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpost import adapted_layers, layers
from fastpost.adapted_layers import ATTENTIONS, unfused_adapters, ungrouped_projections

BF16, FP32 = torch.bfloat16, torch.float32
IDS = torch.arange(3, 67).view(2, 32)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(**options: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        **options,
    )
    return AutoModelForCausalLM.from_config(config)


def adapted(
    *, r: int = 4, dtype: torch.dtype = FP32, model: Any = None, **options: Any
) -> PeftModel:
    options = {"target_modules": LINEARS, "lora_alpha": 8, "init_lora_weights": False} | options
    torch.manual_seed(2)
    peft = get_peft_model((model or base()).to(dtype), LoraConfig(r=r, **options))
    for name, parameter in peft.named_parameters():
        if "magnitude" in name:  # away from the norm, where DoRA starts
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape))
        if "_proj.base_layer.bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every trained parameter."""
    model.zero_grad()
    found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **grads}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].double() - value.double()).abs().max()
        assert error <= tolerance * value.double().abs().max(), f"{name}: {error:.2g}"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel ran."""
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        original = getattr(adapted_layers, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(adapted_layers, name, counted)

    for name in ("lora_linear", "lora_linears", "dora_linear", "nf4_linear", "dora_weight_norm"):
        count(name)
    return counts


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_peft(calls, use_dora: bool, use_rslora: bool) -> None:
    expected = run(adapted(use_dora=use_dora, use_rslora=use_rslora))
    assert sum(float(grad.abs().sum()) > 0 for grad in expected.values()) > 28
    model = adapted(use_dora=use_dora, use_rslora=use_rslora)
    layers.attach(model)
    assert_same(run(model), expected, 2e-5)
    assert not unfused_adapters(model)
    assert calls["dora_linear" if use_dora else "lora_linear"] == 4
    assert calls["lora_linears"] == 4  # q, k and v share a pass, gate and up another
    assert not ungrouped_projections(model)
    layers.detach(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_attention_classes_multiply_what_they_are_given() -> None:
    """Each listed class exists, and its projections take `hidden_states` itself."""
    for module, name in ATTENTIONS:
        forward = getattr(importlib.import_module(module), name).forward
        source = inspect.getsource(inspect.unwrap(forward))
        for part in ("q_proj", "k_proj", "v_proj"):
            assert f"self.{part}(hidden_states)" in source, (name, part)


def test_what_is_shared_follows_the_layers(calls) -> None:
    """q and v alone, checkpointing, hooks, another input, an error: equal, and nothing is left."""
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    expected, model = run(adapted(**options)), adapted(**options)
    layers.attach(model)
    assert_same(run(model), expected, 2e-5)
    assert calls == {"lora_linears": 2}
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model), expected, 2e-5)
    assert calls == {"lora_linears": 6}
    model.gradient_checkpointing_disable()

    attention = model.base_model.model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 5, 64)
    expected_y = attention.v_proj(other)
    calls.clear()
    handle = attention.v_proj.register_forward_hook(lambda *_: None)
    assert ungrouped_projections(model) == {"a hook on a projection": 1}
    run(model)
    assert calls == {"lora_linear": 2, "lora_linears": 1}
    handle.remove()
    own = attention.__dict__.pop("forward")
    assert ungrouped_projections(model) == {"LlamaAttention runs its own forward": 1}
    attention.__dict__["forward"] = own

    seen = []

    def asks_another(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(attention.v_proj(other))  # while the product of x is prepared
        raise KeyError

    attention.k_proj.register_forward_pre_hook(asks_another)
    with pytest.raises(KeyError):
        attention(x, position_embeddings=(torch.ones(1, 5, 16), torch.zeros(1, 5, 16)))
    torch.testing.assert_close(seen[0], expected_y)
    assert not any("_prepared" in module.__dict__ for module in model.modules())
    plain = model.unload()
    layers.detach(plain)
    assert not any("forward" in module.__dict__ for module in plain.modules())


@pytest.mark.parametrize("use_dora", [False, True])
def test_bf16_with_fp32_adapters(use_dora: bool) -> None:
    """As PEFT builds them: no further from the truth than PEFT itself."""
    truth = run(adapted(use_dora=use_dora))
    stock = adapted(use_dora=use_dora, dtype=BF16)
    ours = adapted(use_dora=use_dora, dtype=BF16)
    layers.attach(ours)
    found, expected = run(ours), run(stock)
    assert {p.dtype for n, p in ours.named_parameters() if "lora" in n} == {FP32}
    for name, value in truth.items():
        scale = value.abs().max()
        ours_error = (found[name].float() - value).abs().max() / scale
        peft_error = (expected[name].float() - value).abs().max() / scale
        assert ours_error <= 2 * peft_error + 0.01, name


def test_autocast(calls) -> None:
    results = []
    for attach in (False, True):
        model = adapted(use_dora=True)
        if attach:
            layers.attach(model)
        with torch.autocast("cpu", BF16):
            results.append(run(model))
    assert_same(results[1], results[0], 0.08)
    assert calls["dora_linear"] == 4 and calls["lora_linears"] == 4


def test_adapters_in_every_state(calls) -> None:
    """Two adapters, switched, disabled, merged, named per row; then saved: all as PEFT does."""
    models = []
    for attach in (False, True):
        model = adapted()
        torch.manual_seed(5)
        model.add_adapter(
            "other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        if attach:
            layers.attach(model)
        models.append(model)
    stock, ours = models

    def check(tolerance: float = 2e-5, **options: Any) -> None:
        with torch.no_grad():
            expected, got = (m(input_ids=IDS, **options).logits for m in (stock, ours))
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    check()
    for model in models:
        model.set_adapter("other")
    check()
    fused = calls["lora_linear"]
    for model in models:
        model.base_model.set_adapter(["default", "other"])
    check()
    assert calls["lora_linear"] > fused  # layers that "other" does not adapt have one adapter still
    with stock.disable_adapter(), ours.disable_adapter():
        before = dict(calls)
        check()
        assert calls == before
    for model in models:
        model.set_adapter("default")
        model.merge_adapter()
    check()
    assert unfused_adapters(ours) == {"an adapter is merged": 14}
    for model in models:
        model.unmerge_adapter()
    check(1e-4)
    for model in models:
        model.eval()
    check(adapter_names=["default", "__base__"])


def test_files_are_pefts(tmp_path) -> None:
    """Stock PEFT writes the same bytes and reads ours; a loaded adapter is fused."""
    stock, ours = adapted(use_dora=True), adapted(use_dora=True)
    layers.attach(ours)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    layers.attach(loaded)
    for model in (loaded, ours):  # biases of the base are not in the adapter's file
        for name, parameter in model.named_parameters():
            if "_proj.base_layer.bias" in name:
                parameter.data.zero_()
    torch.testing.assert_close(loaded(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-5)


def test_norms_are_kept_under_ddp_and_not_where_parameters_are_sharded(
    calls, tmp_path, monkeypatch
) -> None:
    """Until an optimizer has shown its parameters to be whole, every forward computes norms."""
    monkeypatch.setattr(adapted_layers, "_is_sharded", None)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = adapted(use_dora=True)
        layers.attach(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        ddp = torch.nn.parallel.DistributedDataParallel(model)

        def norms_of_two_forwards() -> int:
            calls["dora_weight_norm"] = 0
            with torch.no_grad():
                ddp(IDS), ddp(IDS)
            return calls["dora_weight_norm"]

        assert norms_of_two_forwards() == 28
        ddp(IDS).logits.square().mean().backward()
        torch.optim.SGD(trained, lr=0.1).step()
        assert norms_of_two_forwards() == 14
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        shard = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(4), mesh))
        shard.grad = torch.zeros_like(shard)
        torch.optim.SGD([shard], lr=0.1).step()
        assert norms_of_two_forwards() == 28
    finally:
        torch.distributed.destroy_process_group()


def test_norms_follow_what_changes_an_adapter(calls) -> None:
    """Computed once; again after an optimizer's step (however it writes), a load, a new base."""
    model = adapted(use_dora=True)
    layers.attach(model)
    with torch.no_grad():
        model(IDS), model(IDS)
    assert calls["dora_weight_norm"] == 14

    def check_anew(expected_norms: int = 14) -> None:
        calls["dora_weight_norm"] = 0
        stock = copy.deepcopy(model)
        layers.detach(stock)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        assert calls["dora_weight_norm"] == expected_norms

    run(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=0.05).step()
    check_anew()

    class Raw(torch.optim.Optimizer):
        """Writes where autograd does not look, as optimizers of other libraries do."""

        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(0.01)

    Raw(trained, {}).step()
    check_anew()
    model.load_state_dict(
        {n: p + 0.01 for n, p in model.state_dict().items() if "lora" in n}, False
    )
    check_anew()
    with torch.no_grad():
        layer = model.base_model.model.model.layers[0].mlp.gate_proj.base_layer
        layer.weight.add_(0.1)
    check_anew(1)
    check_anew(0)


def test_dropout_is_drawn_anew_and_repeated_by_checkpointing(calls) -> None:
    model = adapted(lora_dropout=0.5).train()
    layers.attach(model)
    with torch.no_grad():
        first, second = model(IDS).logits, model(IDS).logits
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    torch.manual_seed(9)
    calls.clear()
    expected = run(model)
    assert "lora_linears" not in calls  # each projection draws its own mask
    assert ungrouped_projections(model) == {"lora_dropout": 4}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(9)
    assert_same(run(model), expected, 1e-6)


def test_dropout_has_pefts_mean() -> None:
    """Averaged over many masks, the layer is the one without dropout."""
    model = adapted(lora_dropout=0.3).train()
    layers.attach(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(600)]).mean(0)
        layer.eval()
        expected = layer(x)
    plain = layer.base_layer(x)
    assert (mean - expected).abs().max() < 0.2 * (expected - plain).abs().max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [5, 6]}, "variant ALoraLinearVariant"),
    ],
)
def test_what_is_not_fused_is_pefts_own_and_named(options, reason: str) -> None:
    expected, model = run(adapted(**options)), adapted(**options)
    layers.attach(model)
    assert unfused_adapters(model) == {reason: 14}
    assert_same(run(model), expected, 1e-5)


def test_hooks_on_parts_are_called() -> None:
    model = adapted(use_dora=True)
    layers.attach(model)
    seen = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert unfused_adapters(model) == {"a hook on a part of the layer": 1}
    model(IDS)
    assert seen
    handle.remove()
    seen.clear()
    layer.register_forward_hook(lambda *_: seen.append(1))
    model(IDS)
    assert seen and not unfused_adapters(model)


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiles_once(use_dora: bool) -> None:
    """DoRA's norm changes with every step, the compiled code does not."""
    model = adapted(use_dora=use_dora)
    layers.attach(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: layer(x), backend=counter)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(3, 7, 64)
    frames = None
    for _ in range(3):
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.square().sum().backward()
        optimizer.step()
        frames = counter.frame_count if frames is None else frames
    assert counter.frame_count == frames


@pytest.fixture
def four_bit() -> Callable[..., PeftModel]:
    """A model whose projections are bitsandbytes' 4-bit layers, adapted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")

    def build(*, use_dora: bool, double_quant: bool) -> PeftModel:
        model = base()
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and name != "lm_head":
                    layer = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        child.bias is not None,
                        FP32,
                        double_quant,
                        "nf4",
                    )
                    layer.weight = bnb.nn.Params4bit(
                        child.weight.data,
                        requires_grad=False,
                        quant_type="nf4",
                        compress_statistics=double_quant,
                    ).to("cpu")
                    layer.bias = child.bias
                    setattr(parent, name, layer)
        return adapted(model=model, use_dora=use_dora)

    return build


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_four_bit_layers(calls, four_bit, use_dora: bool, double_quant: bool) -> None:
    options = {"use_dora": use_dora, "double_quant": double_quant}
    expected, model = run(four_bit(**options)), four_bit(**options)
    layers.attach(model)
    assert not unfused_adapters(model)
    assert_same(run(model), expected, 5e-5)
    assert calls["dora_linear" if use_dora else "nf4_linear"] == 14
