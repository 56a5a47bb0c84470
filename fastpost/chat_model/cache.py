"""Every reply of a chat model on disk, so that no call is paid for twice.

    <folder>/<model and sampling>.jsonl    {"key": ..., "text": ..., "is_whole": ..., "check": ...}

A reply is found by the SHA-256 of conversation and seed, in a file named after the SHA-256 of what
the model says it is (`identity`). A line is written as its reply arrives and never changed, so a
killed run asks only for what it had not received. Half a line, which a full disk or a lost machine
leaves, is passed over and asked for again. Several processes may write to one file.

A conversation without a reply (None) is not kept: the next run asks again.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpost.chat_model.interface import (
    ChatModel,
    ChoosingModel,
    Conversation,
    IdentifiedChatModel,
    Reply,
    UserTurnModel,
    ask_each,
    content_digest,
    in_order,
)

__all__ = ["CacheUnwritable", "CachedChatModel", "ReplyLog"]


class CacheUnwritable(RuntimeError):
    """A reply cannot be kept, such as on a full disk; those before it are."""


class ReplyLog:
    """Replies by key, appended to a file.

    Args:
        path: the file; it and its folder are made with the first reply.

    Attributes:
        damaged: lines that were passed over.

    Raises:
        OSError: the file is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        # Where each reply's line begins, not the reply: memory stays small for millions of them.
        self._starts: dict[str, int] = {}
        self._read = 0
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, key: str) -> bool:
        return key in self._starts

    def refresh(self) -> None:
        """Takes in the lines that were added since, by other processes too."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # half a line, or one that another process is writing
                record = _record(line)
                if record is not None:
                    self._starts.setdefault(record["key"], self._read)
                elif not line.isspace():
                    self.damaged += 1
                self._read += len(line)

    def get(self, key: str) -> Reply | None:
        """The reply, None where there is none."""
        start = self._starts.get(key)
        if start is None:
            return None
        with self.path.open("rb") as file:
            file.seek(start)
            record = _record(file.readline())
        if record is None or record["key"] != key:
            raise RuntimeError(f"{self.path} was changed while it was in use; start again")
        return Reply(record["text"], record["is_whole"])

    def put(self, key: str, reply: Reply) -> None:
        """Appends a reply.

        Raises:
            CacheUnwritable: it cannot be written, such as on a full disk; what is there stays good.
        """
        line = _line(key, reply)
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    start = file.seek(0, os.SEEK_END)
                    if start:  # half a line must not swallow this one
                        file.seek(start - 1)
                        if file.read(1) != b"\n":
                            line, start = b"\n" + line, start + 1
                    file.write(line)
                    file.flush()
            except OSError as error:
                raise CacheUnwritable(
                    f"{self.path} cannot be written: {error}; the replies before this one are "
                    "kept. Free some space or name another folder, and start again"
                ) from error
            self._starts[key] = start

    def sync(self) -> None:
        """Has the replies on the disk, for the case that the machine loses power."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def _line(key: str, reply: Reply) -> bytes:
    body = json.dumps({"key": key, "text": reply.text, "is_whole": reply.is_whole})
    return f'{body[:-1]}, "check": {zlib.crc32(body.encode())}}}\n'.encode()


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's reply; None where the line is not as it was written."""
    try:
        record = json.loads(line)
        key, text, is_whole = record["key"], record["text"], record["is_whole"]
    except (ValueError, LookupError, TypeError):
        return None
    if not (isinstance(key, str) and isinstance(text, str) and isinstance(is_whole, bool)):
        return None
    return record if _line(key, Reply(text, is_whole)) == line else None


class CachedChatModel:
    """A `ChatModel` that asks another one only for what it was not asked before.

    Args:
        model: says what it is in `identity`.
        folder: of the files; models share it.

    Attributes:
        asked, found: conversations passed on to the model, and those whose reply was there.

    Raises:
        TypeError: the model has no `identity`.
    """

    def __init__(self, model: ChatModel, folder: str | Path) -> None:
        if not isinstance(model, IdentifiedChatModel):
            raise TypeError(
                f"{type(model).__name__} has no `identity`; give it one with everything that its "
                "replies depend on, or a cache would mistake another model's replies for its own"
            )
        self.model = model
        name = content_digest(model.identity)
        self.log = ReplyLog(Path(folder).expanduser() / f"{name}.jsonl")
        self.asked = self.found = 0

    @property
    def identity(self) -> dict[str, Any]:
        """The model's."""
        return self.model.identity

    def __call__(
        self,
        conversations: Sequence[Conversation],
        *,
        seed: int,
        cache_as: Sequence[Any] | None = None,
    ) -> list[str | None]:
        """As the model; `cache_as` see `stream`."""
        found = self.stream(conversations, seed=seed, cache_as=cache_as)
        return in_order(found, len(conversations))

    def stream(
        self,
        conversations: Sequence[Conversation],
        *,
        seed: int,
        cache_as: Sequence[Any] | None = None,
    ) -> Iterator[tuple[int, Reply | None]]:
        """Replies that are there, then the others as they arrive.

        Args:
            conversations, seed: as for the model. A conversation given twice is asked for once.
            cache_as: what each conversation is found by in its place, as JSON can hold it; for
                conversations that hold something random which must not matter.
        """
        keys = self.keys(conversations, seed, cache_as)

        def ask(missing: list[int]) -> Iterator[tuple[int, Reply | None]]:
            return ask_each(self.model, [conversations[i] for i in missing], seed=seed)

        yield from self._stream(keys, ask)

    def stream_user_turns(
        self, conversations: Sequence[Conversation], seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply | None]]:
        """The user's next message after each conversation, of a model that can say it.

        Raises:
            TypeError: the model cannot.
        """
        model = self.model
        if not isinstance(model, UserTurnModel):
            raise TypeError(f"{type(model).__name__} cannot speak as the user; use a local model")
        keys = [
            content_digest(["user turn", conversation, seed])
            for conversation, seed in zip(conversations, seeds, strict=True)
        ]

        def ask(missing: list[int]) -> Iterator[tuple[int, Reply | None]]:
            return model.stream_user_turns(
                [conversations[i] for i in missing], [seeds[i] for i in missing]
            )

        yield from self._stream(keys, ask)

    def stream_choices(
        self,
        conversations: Sequence[Conversation],
        choices: Sequence[str],
        *,
        cache_as: Sequence[Any] | None = None,
    ) -> Iterator[tuple[int, Reply | None]]:
        """The likeliest of `choices` as the reply, of a model that can be held to them.

        Raises:
            TypeError: the model cannot.
        """
        model = self.model
        if not isinstance(model, ChoosingModel):
            raise TypeError(f"{type(model).__name__} cannot be held to choices; use a local model")
        keys = self.keys(conversations, 0, cache_as)
        keys = [content_digest(["choice", key, list(choices)]) for key in keys]

        def ask(missing: list[int]) -> Iterator[tuple[int, Reply | None]]:
            return model.stream_choices([conversations[i] for i in missing], choices)

        yield from self._stream(keys, ask)

    def keys(
        self, conversations: Sequence[Conversation], seed: int, cache_as: Sequence[Any] | None
    ) -> list[str]:
        """What the replies are found by.

        Raises:
            ValueError: `cache_as` is not one for each conversation.
        """
        named = conversations if cache_as is None else cache_as
        if len(named) != len(conversations):
            raise ValueError(
                f"cache_as has {len(named)} entries for {len(conversations)} conversations"
            )
        return [content_digest(["reply", name, seed]) for name in named]

    def _stream(
        self, keys: list[str], ask: Callable[[list[int]], Iterator[tuple[int, Reply | None]]]
    ) -> Iterator[tuple[int, Reply | None]]:
        """What is there, then what `ask` brings for the places given to it."""
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            kept = self.log.get(key)
            if kept is not None:
                self.found += 1
                yield place, kept
            else:
                places.setdefault(key, []).append(place)
        if not places:
            return
        missing = list(places)
        try:
            for number, reply in ask([places[key][0] for key in missing]):
                self.asked += 1
                if reply is not None:
                    self.log.put(missing[number], reply)
                for place in places[missing[number]]:
                    yield place, reply
        finally:
            self.log.sync()
