"""`mlp_tile_tokens` and offloaded inputs of layers in trainers: obeyed, and the same run."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastpost import load_nf4
from fastpost.offloaded_states import HostStates
from tests.trainers import methods
from tests.trainers.methods import METHODS

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
TILE = 24
FAST = {"SFT", "DPO", "Reward"}


def build(name: str, folder: Path, lora: Any = None, **config: Any) -> Any:
    method = METHODS[name]
    settings = methods.settings_of(method, folder, max_steps=2, learning_rate=1e-3, **config)
    model = method.model()
    model.config._name_or_path = str(methods.saved_model(name, folder))
    options = method.options(torch.float32)
    if lora is not None:
        options = {"peft_config": lora}
    return methods.build_trainer(method, settings, model, **options)


def train(trainer: Any) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer.train()
    trainer.engine.remove()
    return trainer.trace


def rows_of_mlps(trainer: Any) -> list[int]:
    """Tokens of every call of an MLP's last projection, of the policy and of its reference."""
    found: list[int] = []
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        for name, module in model.named_modules() if model is not None else ():
            if name.endswith("mlp.down_proj"):
                module.register_forward_hook(lambda m, i, out: found.append(out.shape[:-1].numel()))
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow, id=n) for n in METHODS],
)
def test_mlps_are_tiled(name: str, tmp_path: Path) -> None:
    """In the policy and the reference; losses and weights are those of the usual run."""
    usual = build(name, tmp_path)
    untiled = rows_of_mlps(usual)
    expected = train(usual)
    trainer = build(name, tmp_path, mlp_tile_tokens=TILE)
    rows = rows_of_mlps(trainer)
    ours = train(trainer)
    assert max(untiled) > 2 * TILE and max(rows) <= TILE
    assert ours.losses == pytest.approx(expected.losses, rel=1e-5, abs=1e-6)
    for key, weight in expected.weights.items():
        torch.testing.assert_close(ours.weights[key], weight, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["DPO"]
    + [
        pytest.param(n, marks=pytest.mark.slow)
        for n in ("Reward", "PRM", "GRPO", "OnlineDPO", "PPO")
    ],
)
def test_steps_in_the_backward_are_the_usual_ones(name: str, tmp_path: Path) -> None:
    expected, ours = (
        train(build(name, tmp_path, optimizer_in_backward=chosen)) for chosen in (False, True)
    )
    assert expected.losses == ours.losses
    assert expected.gradients and not ours.gradients
    assert all(torch.equal(w, ours.weights[key]) for key, w in expected.weights.items())


def test_tiles_of_4_bit_layers_with_adapters(tmp_path: Path) -> None:
    """And each layer's adapters are updated within the backward."""
    method = METHODS["SFT"]
    folder = methods.saved_model("SFT", tmp_path)
    traces = []
    for options in ({}, {"mlp_tile_tokens": TILE, "optimizer_in_backward": True}):
        settings = methods.settings_of(method, tmp_path, max_steps=2, **options)
        model = load_nf4(folder, dtype=torch.float32, device="cpu")
        trainer = methods.build_trainer(method, settings, model, peft_config=LORA)
        rows = rows_of_mlps(trainer)
        traces.append(train(trainer))
        assert (max(rows) <= TILE) == bool(options)
    one, other = traces
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    for key, weight in one.weights.items():
        torch.testing.assert_close(other.weights[key], weight, atol=3e-5, rtol=1e-4)


def test_no_tile_of_less_than_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mlp_tile_tokens must be at least 1, got 0"):
        build("SFT", tmp_path, mlp_tile_tokens=0)


@pytest.mark.parametrize("option", ["offload", "every_n_layers"])
def test_options_of_layers_that_are_not_checkpointed_are_refused(
    option: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"asks for {option}, but activation_checkpointing is"):
        build("SFT", tmp_path, activation_checkpointing_kwargs={option: 1})


@pytest.mark.parametrize(
    ("name", "lora"),
    [("SFT", None), ("DPO", LORA), pytest.param("GRPO", None, marks=pytest.mark.slow)],
)
def test_offloaded_inputs_leave_the_run_as_it_is(
    name: str, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; TRL switches checkpointing off and on around reference passes and rollouts."""
    sent: list[torch.Size] = []
    pack = HostStates.pack
    monkeypatch.setattr(HostStates, "pack", lambda s, x: (sent.append(x.shape), pack(s, x))[1])
    traces = []
    for offload in (False, True):
        options = {"use_reentrant": False, "offload": offload}
        trainer = build(
            name,
            tmp_path,
            lora,
            gradient_checkpointing=True,
            activation_checkpointing_kwargs=options,
        )
        traces.append(train(trainer))
        layers = trainer.model.config.num_hidden_layers
        assert len(sent) == (2 * layers if offload else 0)
    one, other = traces
    assert one.losses == other.losses
    assert all(torch.equal(weight, other.weights[key]) for key, weight in one.weights.items())


def test_everything_at_once(tmp_path: Path) -> None:
    """Tiles, offloaded inputs and steps in the backward: the run without any of them."""
    expected = train(build("SFT", tmp_path))
    ours = train(
        build(
            "SFT",
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": False, "offload": True},
            mlp_tile_tokens=TILE,
            optimizer_in_backward=True,
        )
    )
    assert ours.losses == pytest.approx(expected.losses, rel=1e-5)
    for key, weight in expected.weights.items():
        torch.testing.assert_close(ours.weights[key], weight, atol=3e-5, rtol=1e-4)
