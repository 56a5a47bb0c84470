"""Endpoints that answer, dawdle, babble and fail, behind a server on this machine."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastpost.chat_model.endpoint import EndpointChatModel, EndpointRefused
from fastpost.chat_model.interface import Sampling
from tests.chat_model.endpoint_server import Endpoint, reply, scripted, serving, user_text


def asking(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def chat(server: Endpoint, **options: Any) -> EndpointChatModel:
    settings = {"pause_seconds": 0.0, "timeout_seconds": 20.0} | options
    return EndpointChatModel(server.url, "some-model", **settings)


def test_replies_come_in_the_order_of_the_conversations() -> None:
    with serving(lambda body: reply(user_text(body).upper(), usage=(7, 2))) as server:
        sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=9)
        model = chat(server, sampling=sampling, api_key="secret", concurrency=3)
        texts = [f"text {i}" for i in range(20)]
        assert model(asking(*texts), seed=5) == [text.upper() for text in texts]
    sent = server.received[0]
    assert sent["model"] == "some-model" and sent["seed"] == 5
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0.5, 0.9, 9)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in str(model.identity)
    assert (model.usage.calls, model.usage.prompt_tokens, model.usage.reply_tokens) == (20, 140, 40)
    assert model.usage.failures == model.usage.estimated == 0


def test_requests_run_at_once_and_no_more_than_allowed() -> None:
    arrived = threading.Barrier(4)
    with serving(lambda body: reply("")) as server:
        under_way = most = 0
        counting = threading.Lock()
        act = server.act

        def meet(body: dict[str, Any]) -> Any:
            nonlocal under_way, most
            # The handler holds the lock as it asks for its action: give it up to meet others.
            server.lock.release()
            try:
                with counting:
                    under_way += 1
                    most = max(most, under_way)
                arrived.wait(20)
                with counting:
                    under_way -= 1
            finally:
                server.lock.acquire()
            return act(body)

        server.act = meet
        assert chat(server, concurrency=4)(asking(*"abcdefgh"), seed=0) == [""] * 8
    assert most == 4


MISBEHAVIOUR = [
    (500, "<html>error</html>"),
    (429, "{}"),
    (503, ""),
    (200, "<html>login</html>"),
    (200, "{broken"),
    (200, "[]"),
    (200, "[" * 100_000),
    (200, '{"choices": []}'),
    (200, '{"choices": [{"message": "text"}]}'),
    (200, '{"error": {"message": "overloaded"}}'),
    (200, ""),
    (200, "{}", {"Content-Length": "100"}),
    (200, "x\r\n{}", {"Transfer-Encoding": "chunked"}),
    reply(None),
    reply(["parts"]),
]


@pytest.mark.parametrize("bad", MISBEHAVIOUR, ids=lambda bad: str(bad)[:40])
def test_misbehaviour_is_asked_again_and_then_given_up(bad: Any) -> None:
    actions = [bad, reply("good")]
    with serving(scripted(actions)) as server:
        assert chat(server, attempts=2)(asking("p"), seed=0) == ["good"]
        actions[:] = [bad, bad]
        model = chat(server, attempts=2)
        assert model(asking("p"), seed=0) == [None]
    assert model.usage.calls == model.usage.failures == 2
    assert model.last_error is not None and server.url in model.last_error


def test_silence_ends_at_the_timeout() -> None:
    silence = threading.Event()
    try:
        with serving(scripted([silence, reply("late but good")])) as server:
            model = chat(server, attempts=2, timeout_seconds=0.2)
            assert model(asking("p"), seed=0) == ["late but good"]
    finally:
        silence.set()
    assert model.usage.failures == 1


def test_a_conversation_the_server_will_not_take_costs_no_other_its_reply() -> None:
    def act(body: dict[str, Any]) -> Any:
        return (400, "too long") if user_text(body) == "long" else reply("ok")

    with serving(act) as server:
        model = chat(server, attempts=4)
        assert model(asking("a", "long", "b"), seed=0) == ["ok", None, "ok"]
    assert len(server.received) == 3  # asking again would not help
    assert "too long" in (model.last_error or "")


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_ends_the_run_after_the_replies_under_way(status: int) -> None:
    def act(body: dict[str, Any]) -> Any:
        refusal = (status, "no such model", {"Location": "http://127.0.0.1:1/"})
        return refusal if user_text(body) == "b" else reply("ok")

    with serving(act) as server:
        found = []
        with pytest.raises(EndpointRefused, match=rf"{status}.*check the address"):
            for item in chat(server, concurrency=1).stream(asking("a", "b", "c"), seed=0):
                found.append(item)
    assert [(place, r and r.text) for place, r in found] == [(0, "ok")]
    assert len(server.received) == 2


def test_an_unreachable_endpoint_is_named() -> None:
    model = EndpointChatModel("http://127.0.0.1:1/", "m", attempts=2, pause_seconds=0)
    assert model(asking("p"), seed=0) == [None]
    assert "127.0.0.1:1/" in (model.last_error or "")


def test_pauses_double_or_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("fastpost.chat_model.endpoint.time.sleep", pauses.append)
    asked = (429, "", {"Retry-After": "7"})
    dated = (503, "", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
    with serving(scripted([(500, ""), asked, dated, (500, ""), reply("x")])) as server:
        model = chat(server, attempts=5, pause_seconds=0.5)
        assert model(asking("p"), seed=0) == ["x"]
    assert pauses == [0.5, 7.0, 2.0, 4.0]


def test_a_reply_that_was_cut_off_says_so() -> None:
    with serving(scripted([reply("half a", finish="length"), reply("whole")])) as server:
        model = chat(server, concurrency=1)
        found = dict(model.stream(asking("a", "b"), seed=0))
    assert [found[0].is_whole, found[1].is_whole] == [False, True]
    assert model.usage.estimated == 2 and model.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "file:///etc/passwd"}, "file:"),
        ({"concurrency": 0}, "at least 1"),
        ({"attempts": 0}, "at least 1"),
        ({"timeout_seconds": 0}, "positive"),
    ],
)
def test_options_are_refused_with_their_value(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EndpointChatModel(**{"url": "http://x", "model": "m"} | options)


def test_what_is_no_conversation_is_refused_before_any_request() -> None:
    with serving(lambda body: reply("")) as server:
        model = chat(server)
        with pytest.raises(ValueError, match="list of messages"):
            model([*asking("a"), "text"], seed=0)
    assert server.received == []
