"""Offloaded inputs of checkpointed layers: moved, back in time, and bit for bit the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from fastpost import offloaded_states
from fastpost.checkpointed_layers import keep_layer_options
from fastpost.offloaded_states import HostStates, offloading

LAYERS = 5


class LazyDevice:
    """Stands in for `torch.cuda`: copies run when they are waited for, and not a moment sooner."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: list[Callable[[], None]] = []
        self.log: list[str] = []
        self.is_aside = False
        monkeypatch.setattr(offloaded_states, "_copy", self.copy)

    def copy(self, to: Any, source: Any) -> None:
        assert self.is_aside
        for one in to:
            one.fill_(torch.nan)
        self.queue.append(lambda: [a.copy_(b) for a, b in zip(to, source, strict=True)])

    def Stream(self, device: Any) -> LazyDevice:
        return self

    def current_stream(self, device: Any) -> str:
        return "compute"

    @contextmanager
    def stream(self, side: Any) -> Any:
        self.is_aside = True
        yield
        self.is_aside = False

    def wait_stream(self, other: str) -> None:
        self.log.append(f"copies wait for {other}")

    def record_event(self) -> Any:
        self.log.append("copy")
        device, ends = self, len(self.queue)

        class Event:
            def wait(self) -> None:
                device.log.append(f"wait {ends}")
                for i in range(ends):
                    device.queue[i]()
                    device.queue[i] = lambda: None

        return Event()


def layers(width: int = 24) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        for _ in range(LAYERS)
    )


def run(net: nn.ModuleList, recompute: Any, before_backward: Any = None) -> list[Tensor]:
    """Output, gradient of the input and of all weights."""
    net.zero_grad()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(7, 24, generator=generator, requires_grad=True)
    x = start
    inputs = []
    for layer in net:
        inputs.append(StorageWeakRef(x.untyped_storage()))
        x = recompute(layer, x)
    if before_backward is not None:
        gc.collect()
        before_backward(inputs[1:])
    x.square().sum().backward()
    return [x.detach(), start.grad, *(p.grad.clone() for p in net.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inputs_are_gone_and_results_are_the_same(use_reentrant: bool) -> None:
    net = layers()
    plain = partial(checkpoint, use_reentrant=use_reentrant)
    kept: list[bool] = []
    expected = run(net, plain, lambda inputs: kept.extend(x.expired() for x in inputs))
    assert not any(kept)
    gone: list[bool] = []
    ours = run(net, offloading(plain), lambda inputs: gone.extend(x.expired() for x in inputs))
    assert len(gone) == LAYERS - 1 and all(gone)
    assert same(expected, ours)


def test_copies_aside_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies as late as they may be; two are under way, and all but two come back."""
    net = layers()
    plain = partial(checkpoint, use_reentrant=False)
    expected = run(net, plain)
    device = LazyDevice(monkeypatch)
    states = HostStates(device, piece_bytes=100)
    alive: list[int] = []

    def count(inputs: list[StorageWeakRef]) -> None:
        alive.append(sum(not x.expired() for x in inputs))
        device.log.append("backward")

    ours = run(net, offloading(plain, states), count)
    assert same(expected, ours)
    assert not states._leaving
    split = device.log.index("backward")
    forward, backward = device.log[:split], device.log[split + 1 :]
    out = ["copies wait for compute", "copy"]
    assert forward == [*out, *out, "wait 1", *out, "wait 2", *out, "wait 3", *out]
    # The last input is still there; the one before it too, then each is fetched one layer ahead.
    assert backward == ["wait 5", "wait 4", *out, "wait 6", *out, "wait 7", *out, "wait 8"]


def test_a_copy_that_is_not_waited_for_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = layers()
    plain = partial(checkpoint, use_reentrant=False)
    expected = run(net, plain)
    device = LazyDevice(monkeypatch)
    states = HostStates(device)
    fetch = states._fetch

    def fetch_without_event(kept: Any) -> None:
        fetch(kept)
        kept.event = type("Event", (), {"wait": lambda self: None})()

    monkeypatch.setattr(states, "_fetch", fetch_without_event)
    assert not same(expected, run(net, offloading(plain, states)))


@pytest.mark.parametrize("piece", [64, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces(piece: int, dtype: torch.dtype) -> None:
    states = HostStates(piece_bytes=piece)
    tensor = torch.randn(3, 5, 11).to(dtype).transpose(0, 1)
    kept = states.pack(tensor)
    sizes = [x.nbytes for x in kept.pieces]
    assert sum(sizes) == tensor.nbytes and max(sizes) <= piece
    for _ in range(2):  # a graph may be kept, and asked again
        assert torch.equal(states.unpack(kept), tensor)


def test_what_is_not_an_activation_stays() -> None:
    states = HostStates()
    for tensor in (nn.Parameter(torch.ones(3)), torch.arange(3), torch.ones(0)):
        assert states.pack(tensor) is tensor and states.unpack(tensor) is tensor


def test_a_dropped_graph_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    states = HostStates(LazyDevice(monkeypatch))
    recompute = offloading(partial(checkpoint, use_reentrant=False), states)
    for _ in range(3):
        x = torch.randn(4, 24, requires_grad=True)
        for layer in layers():
            x = recompute(layer, x)
        del x
        assert len(states._leaving) <= 2
    net = layers()
    assert same(run(net, recompute), run(net, partial(checkpoint, use_reentrant=False)))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("every", [1, 2])
def test_options_of_transformers(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every n-th layer's input goes; also after checkpointing was switched off and on again."""
    packed = []
    send = HostStates.pack
    monkeypatch.setattr(
        HostStates, "pack", lambda self, x: (packed.append(x.shape), send(self, x))[1]
    )
    ids = torch.arange(3, 23)[None]
    found = []
    for offload in (False, True):
        model = llama().train()
        options = {"use_reentrant": False, "every_n_layers": every, "offload": offload}
        keep_layer_options(model, options)
        model.gradient_checkpointing_enable(options)
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable(options)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        assert len(packed) == (4 // every if offload else 0)
    assert same(*found)
