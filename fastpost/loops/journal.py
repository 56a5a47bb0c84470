"""What a loop has done, one JSON line each, so that a killed loop goes on where it was.

    {"key": "1-respond/0", "value": ["a reply", null, ...]}

A line is on the disk before the loop goes on, and counts only if it is whole: a line that a kill or
a full disk cut off is removed when the journal is opened next. The first line says what the run is
made of; another run is refused the same folder. One process at a time holds a journal.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastpost.data.rows import DataError

__all__ = ["JOURNAL", "Journal"]

JOURNAL = "journal.jsonl"
_ABOUT = "about"


class Journal:
    """The journal in a folder, open for one run.

    Args:
        folder: made if it is not there.
        about: what the run depends on, JSON values by name.

    Raises:
        DataError: the folder belongs to a run of something else, another process is at work in it,
            it cannot be written, or a line in the middle is damaged.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.path = Path(folder) / JOURNAL
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path} cannot be opened: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._done = self._read()
            self._check(json.loads(json.dumps(about)))
        except BlockingIOError:
            self._file.close()
            raise DataError(
                f"another process is at work in {self.path.parent}; wait for it, or choose another "
                "folder"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *reason: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def count(self, prefix: str) -> int:
        """How many keys begin so."""
        return sum(key.startswith(prefix) for key in self._done)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The value under `key`; made and written down if this is the first time."""
        if key not in self._done:
            self.put(key, make())
        return self._done[key]

    def put(self, key: str, value: Any) -> None:
        """Write a value down, for good.

        Raises:
            DataError: the disk is full; what was written before stays.
            TypeError: a value that JSON has no form for.
        """
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
        data = line.encode("utf-8", "surrogatepass") + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DataError(
                    f"the disk is full: {self.path} is as it was before. Free some space and run "
                    "the loop again, it goes on from there"
                ) from error
            raise DataError(f"{self.path} cannot be written: {error}") from error
        # As a later run would read it: tuples are lists from the beginning.
        self._done[key] = json.loads(line)["value"]

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        content = self._file.readall() or b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        done = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                entry = json.loads(line.decode("utf-8", "surrogatepass"))
                done[entry["key"]] = entry["value"]
            except (ValueError, LookupError, TypeError) as error:
                raise DataError(
                    f"{self.path}, line {number} is damaged ({error}); delete that line, what it "
                    "held is done again"
                ) from error
        return done

    def _check(self, about: dict[str, Any]) -> None:
        before = self._done.get(_ABOUT)
        if before is None:
            if self._done:
                raise DataError(f"{self.path} does not begin with what the run is made of")
            self.put(_ABOUT, about)
            return
        differing = [
            f"{name}: {_shown(before.get(name))} there, {_shown(about.get(name))} now"
            for name in sorted(before.keys() | about.keys())
            if before.get(name) != about.get(name)
        ]
        if differing:
            raise DataError(
                f"{self.path.parent} holds another run:\n  "
                + "\n  ".join(differing)
                + "\nSet these back to go on with it, or choose another folder"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."
