"""Every reply is kept as it arrives: what was killed, cut or shared costs no call twice."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpost.chat_model.cache import CachedChatModel, ReplyLog
from fastpost.chat_model.interface import Reply, ask_each


def asking(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


class Counting:
    """Replies with text and seed, to "none" with nothing; fails at the call of a given number."""

    def __init__(self, fails_at: int | None = None, name: str = "m") -> None:
        self.identity = {"model": name}
        self.fails_at = fails_at
        self.calls: list[str] = []

    def __call__(self, conversations: Any, *, seed: int) -> list[str | None]:
        return [r and r.text for _, r in self.stream(conversations, seed=seed)]

    def stream(self, conversations: Any, *, seed: int) -> Iterator[tuple[int, Reply | None]]:
        for place, conversation in reversed(list(enumerate(conversations))):
            if len(self.calls) == self.fails_at:
                raise ConnectionError("killed")
            text = conversation[-1]["content"]
            self.calls.append(text)
            yield place, None if text == "none" else Reply(f"{text}-{seed}", text != "cut")


def test_what_is_there_is_not_asked_again(tmp_path: Path) -> None:
    inner = Counting()
    model = CachedChatModel(inner, tmp_path)
    texts = asking("a", "b", "a", "ü\n\ud800")
    first = model(texts, seed=1)
    assert first == ["a-1", "b-1", "a-1", "ü\n\ud800-1"] and len(inner.calls) == 3
    again = CachedChatModel(Counting(fails_at=0), tmp_path)
    assert again(texts, seed=1) == first and again.found == 4 and again.asked == 0


def test_another_seed_model_or_conversation_is_asked(tmp_path: Path) -> None:
    CachedChatModel(Counting(), tmp_path)(asking("a"), seed=1)
    for model, conversation, seed in [
        (Counting(), asking("a"), 2),
        (Counting(name="n"), asking("a"), 1),
        (Counting(), [[{"role": "system", "content": "s"}, *asking("a")[0]]], 1),
        (Counting(), [[{"role": "assistant", "content": "a"}]], 1),
    ]:
        CachedChatModel(model, tmp_path)(conversation, seed=seed)
        assert len(model.calls) == 1


def test_no_reply_is_not_kept_and_a_cut_one_stays_cut(tmp_path: Path) -> None:
    model = CachedChatModel(Counting(), tmp_path)
    assert model(asking("none", "cut"), seed=0) == [None, "cut-0"]
    inner = Counting()
    found = dict(CachedChatModel(inner, tmp_path).stream(asking("none", "cut"), seed=0))
    assert inner.calls == ["none"] and found == {0: None, 1: Reply("cut-0", False)}


@pytest.mark.parametrize("fails_at", range(6))
def test_a_run_killed_at_any_call_goes_on_there(tmp_path: Path, fails_at: int) -> None:
    texts = asking(*"abcdef")
    killed, resumed = Counting(fails_at), Counting()
    with pytest.raises(ConnectionError):
        CachedChatModel(killed, tmp_path)(texts, seed=0)
    model = CachedChatModel(resumed, tmp_path)
    assert model(texts, seed=0) == [f"{letter}-0" for letter in "abcdef"]
    assert sorted(killed.calls + resumed.calls) == list("abcdef")


def test_what_a_conversation_is_cached_as_decides(tmp_path: Path) -> None:
    inner = Counting()
    model = CachedChatModel(inner, tmp_path)
    assert model(asking("mark 1"), seed=0, cache_as=["c"]) == ["mark 1-0"]
    assert model(asking("mark 2"), seed=0, cache_as=["c"]) == ["mark 1-0"]
    assert model(asking("mark 2"), seed=0, cache_as=["d"]) == ["mark 2-0"]
    with pytest.raises(ValueError, match="cache_as has 0"):
        model(asking("a"), seed=0, cache_as=[])


def test_a_model_without_identity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no `identity`"):
        CachedChatModel(lambda conversations, *, seed: [], tmp_path)
    with pytest.raises(TypeError, match="cannot speak as the user"):
        list(CachedChatModel(Counting(), tmp_path).stream_user_turns([[]], [0]))


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_half_a_line_costs_only_its_own_reply(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    log = ReplyLog(path)
    log.put("one", Reply("1"))
    log.put("two", Reply("2"))
    path.write_bytes(path.read_bytes()[:-cut])
    log = ReplyLog(path)
    assert log.get("one") == Reply("1") and log.get("two") is None
    log.put("three", Reply("3"))
    log.put("two", Reply("2"))
    for seen in (log, ReplyLog(path)):
        assert [seen.get(key) for key in ("one", "two", "three")] == [
            Reply("1"),
            Reply("2"),
            Reply("3"),
        ]


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = ReplyLog(path)
    for key in ("one", "two", "three"):
        log.put(key, Reply("text " + key))
    path.write_bytes(path.read_bytes().replace(b"text two", b"text owt"))
    log = ReplyLog(path)
    assert log.damaged == 1 and "two" not in log and log.get("three") == Reply("text three")


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    model = CachedChatModel(Counting(), tmp_path)
    model(asking("a"), seed=0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fastpost.chat_model.cache.fcntl.flock", full)
        with pytest.raises(RuntimeError, match=r"cannot be written.*No space left.*are kept"):
            model(asking("b"), seed=0)
    inner = Counting()
    assert CachedChatModel(inner, tmp_path)(asking("a", "b"), seed=0) == ["a-0", "b-0"]
    assert inner.calls == ["b"]


def test_two_logs_of_one_file_keep_each_others_replies(tmp_path: Path) -> None:
    one, other = ReplyLog(tmp_path / "log"), ReplyLog(tmp_path / "log")
    for number in range(5):
        one.put(f"one {number}", Reply("x" * number))
        other.put(f"other {number}", Reply("y" * number))
    one.refresh()
    assert len(one) == 10 and one.get("other 3") == Reply("yyy")


def test_a_killed_process_loses_no_reply(tmp_path: Path) -> None:
    """SIGKILL after the third reply: the next process asks for the others alone."""
    child = textwrap.dedent(
        """
        import os, signal, sys
        from fastpost.chat_model.cache import CachedChatModel
        from fastpost.chat_model.interface import Reply

        class Model:
            identity = {"model": "m"}

            def __call__(self, conversations, *, seed):
                raise AssertionError

            def stream(self, conversations, *, seed):
                for place, conversation in enumerate(conversations):
                    if place == 3:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield place, Reply(conversation[0]["content"] + "-0")

        texts = [[{"role": "user", "content": letter}] for letter in "abcdef"]
        CachedChatModel(Model(), sys.argv[1])(texts, seed=0)
        """
    )
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    inner = Counting()
    model = CachedChatModel(inner, tmp_path)
    assert model(asking(*"abcdef"), seed=0) == [f"{letter}-0" for letter in "abcdef"]
    assert sorted(inner.calls) == list("def")


def test_a_function_is_a_chat_model() -> None:
    found = ask_each(lambda conversations, *, seed: ["x", None], asking("a", "b"), seed=0)
    assert list(found) == [(0, Reply("x")), (1, None)]
    with pytest.raises(RuntimeError, match="1 replies for 2"):
        list(ask_each(lambda conversations, *, seed: ["x"], asking("a", "b"), seed=0))
