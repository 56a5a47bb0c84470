"""Every option a configuration accepts does something, or is refused: none is silently ignored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from trl.experimental import cpo, online_dpo, orpo

from tests.trainers import footprint, methods, option_probes, option_probes_online
from tests.trainers.methods import METHODS
from tests.trainers.option_probes import Changes, Probe, Refused, SameRun, ShownBy
from tests.trainers.option_runs import Runs

PROBES = option_probes.PROBES | option_probes_online.PROBES
BASE_FIELDS = {f.name for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
FAST = {"SFT", "DPO", "GRPO"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    return Runs(folder)


@pytest.mark.parametrize("name", METHODS)
def test_every_field_has_a_probe(name) -> None:
    fields = {f.name for f in dataclasses.fields(METHODS[name].config_class) if f.init}
    assert fields - BASE_FIELDS == PROBES[name].keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in FAST else pytest.mark.slow(minutes=0.04), id=n)
        for n in METHODS
    ],
)
def test_equal_options_leave_equal_footprints(name, runs) -> None:
    """Without this the probes below could pass by accident."""
    one = runs.run(name, "plain", {})
    other = runs.run(name, "plain", {})
    assert footprint.differing(one, other) == set()
    assert one["loss"] and one["gradients"] and one["forwards"] and one["batches"]


def cases() -> list[Any]:
    """Runs of one method are fast tests; refusals of all are, since they cost nothing."""
    found = []
    for name in METHODS:
        for option, probe in PROBES[name].items():
            runs_twice = isinstance(probe, Changes | SameRun)
            marks = pytest.mark.slow(minutes=0.04) if runs_twice and name != "SFT" else ()
            found.append(pytest.param(name, option, probe, id=f"{name}-{option}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "option", "probe"), cases())
def test_option_is_consumed(name, option, probe: Probe, runs) -> None:
    match probe:
        case Changes():
            base = dict(probe.under)
            if probe.instead_of is not None:
                base[option] = probe.instead_of
            one = runs.footprint(name, probe.setup, base)
            other = runs.footprint(name, probe.setup, {**base, **probe.along, option: probe.value})
            assert probe.facet in footprint.differing(one, other)
        case SameRun():
            one = runs.footprint(name, "plain", probe.under)
            other = runs.footprint(name, "plain", {**probe.under, option: probe.value})
            assert footprint.differing(one, other) == set()
        case Refused():
            with pytest.raises(probe.error, match=probe.message):
                runs.run(name, probe.setup, {**probe.under, option: probe.value})
        case ShownBy():
            path, test = probe.test.split("::")
            assert f"def {test}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_paged_is_the_old_name_of_continuous_batching(name, tmp_path) -> None:
    settings = methods.settings_of(METHODS[name], tmp_path, use_transformers_paged=True)
    assert METHODS[name].config_class(**settings).use_transformers_continuous_batching


TRL_CONFIGS = {
    "SFT": trl.SFTConfig,
    "DPO": trl.DPOConfig,
    "KTO": trl.KTOConfig,
    "Reward": trl.RewardConfig,
    "GRPO": trl.GRPOConfig,
    "RLOO": trl.RLOOConfig,
    "CPO": cpo.CPOConfig,
    "ORPO": orpo.ORPOConfig,
    "OnlineDPO": online_dpo.OnlineDPOConfig,
}
# Set by the trainers themselves.
SET_BY_TRAINERS = {"remove_unused_columns", "padding_free", "ddp_find_unused_parameters"}


@pytest.mark.parametrize("name", TRL_CONFIGS)
def test_trl_config_becomes_ours_unchanged(name, tmp_path) -> None:
    method = METHODS[name]
    given = TRL_CONFIGS[name](**methods.settings_of(method, tmp_path, weight_decay=0.125))
    expected = given.to_dict()
    model = method.model()
    model.config._name_or_path = str(methods.saved_model(name, tmp_path))
    trainer = methods.build_trainer(method, given, model)
    taken = trainer.args.to_dict()
    assert isinstance(trainer.args, method.config_class)
    for option in expected.keys() - SET_BY_TRAINERS:
        assert taken[option] == expected[option], option
