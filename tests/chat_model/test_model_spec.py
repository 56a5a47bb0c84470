"""Chat models and judges from plain settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.endpoint import EndpointChatModel
from fastpost.chat_model.model_spec import ModelSpec, weights_name
from fastpost.judges.judge import Judge
from fastpost.judges.judge_file import read_judge, read_judges
from fastpost.judges.panel import Panel
from tests.chat_model.endpoint_server import reply, serving
from tests.trainers.conftest import tiny_model, tokenizer  # noqa: F401


def test_an_endpoint_has_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    spec = ModelSpec.from_mapping(
        {
            "model": "m",
            "endpoint": "http://host/v1/chat/completions",
            "api_key_env": "SOME_KEY",
            "temperature": 0,
            "max_tokens": 9,
            "concurrency": 3,
            "attempts": 2,
            "timeout_seconds": 5,
            "reply_price": 4,
        }
    )
    model = spec.open()
    assert isinstance(model, EndpointChatModel)
    assert model.identity == {"model": "m", "temperature": 0, "top_p": 1.0, "max_tokens": 9}
    assert (model.concurrency, model.attempts, model.timeout_seconds) == (3, 2, 5)
    assert model.price is not None and model.price.of(10**6, 10**6) == 4
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ValueError, match="SOME_KEY is not set"):
        spec.open()


def test_a_local_model_is_named_after_its_weights(tmp_path: Path, tokenizer: Any) -> None:  # noqa: F811
    for seed, name in ((0, "one"), (0, "two"), (1, "three")):
        tiny_model(260, seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    names = [weights_name(tmp_path / name).partition("@") for name in ("one", "two", "three")]
    assert [name for name, _, _ in names] == ["one", "two", "three"]
    assert names[0][2] == names[1][2] != names[2][2] and len(names[0][2]) == 12
    model = ModelSpec(str(tmp_path / "one"), max_tokens=4, batch_size=2).open()
    assert model.identity["model"] == "".join(names[0])
    [text] = model([[{"role": "user", "content": "q"}]], seed=0)
    assert isinstance(text, str)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "no setting model"),
        ({"model": "m", "temprature": 1}, "unknown settings temprature"),
        ({"model": ""}, "model is ''"),
        ({"model": "m", "concurrency": 3}, "concurrency is given.*an endpoint"),
        ({"model": "m", "endpoint": "http://x", "batch_size": 3}, "batch_size.*a local model"),
        ({"model": "m", "endpoint": "http://x", "temperature": -1}, "temperature is -1"),
        ({"model": "m", "temperature": "hot"}, "wrong kind"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelSpec.from_mapping(given)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent cannot be loaded"):
        ModelSpec(str(tmp_path / "absent")).open()


def test_judges_of_a_file(tmp_path: Path) -> None:
    with serving(lambda body: reply('{"grade": 4}')) as server:
        file = tmp_path / "judges.yaml"
        file.write_text(
            f"- {{name: one, model: m, endpoint: '{server.url}'}}\n"
            f"- {{model: n, endpoint: '{server.url}', max_tokens: 32}}\n"
        )
        one, other = read_judges(file, tmp_path / "cache")
        assert (one.name, other.name) == ("one", "n")
        assert isinstance(one.model, CachedChatModel)
        assert one.grade("c", ["p"], ["a"]) == other.grade("c", ["p"], ["a"]) == [0.4]
    assert [body["max_tokens"] for body in server.received] == [256, 32]
    assert server.received[0]["temperature"] == 0
    for text, complaint in [
        ("{}", "expected a list of judges"),
        ("- m", r"judge 1: expected \{model"),
        ("- {model: m, endpoint: 'x'}", "judge 1: url is 'x'"),
        ("- {model: m, endpoint: 'http://x'}\n- {model: n, top_p: 2}", "judge 2: top_p is 2"),
        ("- {", "cannot be read"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            read_judges(file)


def test_who_decides_is_one_judge_or_a_panel(tmp_path) -> None:
    entry = {"model": "m", "endpoint": "http://127.0.0.1:1/v1/chat/completions"}
    one = read_judge(entry)
    assert isinstance(one, Judge) and one.name == "m"
    for count, kind in ((1, Judge), (3, Panel)):
        file = tmp_path / f"{count}.yaml"
        file.write_text(yaml.safe_dump([entry | {"name": f"judge {i}"} for i in range(count)]))
        assert isinstance(read_judge(str(file)), kind)
    file.write_text(yaml.safe_dump([entry | {"name": f"judge {i}"} for i in range(2)]))
    with pytest.raises(ValueError, match="2 judges; give at least 3"):
        read_judge(file)
    with pytest.raises(ValueError, match=r"judge: expected \{model.*got 3"):
        read_judge(3)
