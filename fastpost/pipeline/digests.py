"""What a stage depends on, by content: a stage is done again when any of it changes.

A file's SHA-256 is kept with its size and time of change, so that a finished 60 GB checkpoint is
read once, not at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastpost.data.row_files import whole_file
from fastpost.pipeline.recipe import references

__all__ = ["Digests", "local_path"]


class Digests:
    """Digests of files and folders, remembered in one file.

    Args:
        path: where they are remembered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        """SHA-256 of a file, or over the names and contents of all files below a folder.

        Checkpoints of a training (`checkpoint-N`) are left out: they come and go.
        """
        if path.is_file():
            return self._of_file(path)
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path)
            if not name.parts[0].startswith(("checkpoint-", "_")):
                digest.update(f"{name}\0{self._of_file(file)}\n".encode())
        return digest.hexdigest()

    def save(self) -> None:
        """Remember what was read."""
        with whole_file(self._path) as file:
            file.write(json.dumps(self._known).encode() + b"\n")

    def _of_file(self, path: Path) -> str:
        state = path.stat()
        key, mark = str(path.resolve()), [state.st_size, state.st_mtime_ns]
        known = self._known.get(key)
        if known is None or known[:2] != mark:
            with open(path, "rb") as file:
                known = [*mark, hashlib.file_digest(file, "sha256").hexdigest()]
            self._known[key] = known
        return str(known[2])

    def fingerprint(
        self, kind: str, fields: Mapping[str, Any], made: Callable[[str], str]
    ) -> tuple[str, dict[str, str]]:
        """The fingerprint of a stage's inputs, and the digests that went into it.

        Args:
            kind: of the stage.
            fields: of the stage, with its references.
            made: name of a stage -> digest of what it made.
        """
        found: dict[str, str] = {}

        def seen(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {str(name): seen(part) for name, part in value.items()}
            if isinstance(value, list | tuple):
                return [seen(part) for part in value]
            if isinstance(value, str):
                for name in references(value):
                    found[value] = made(name)
                path = local_path(value)
                if path is not None:
                    found[value] = self.of(path)
                return [value, found.get(value)]
            return value

        text = json.dumps({"kind": kind, "fields": seen(fields)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest(), found


def local_path(text: str) -> Path | None:
    """The file or folder a field names, None for anything else; `FILE.py:FUNCTION` names a file."""
    file, colon, _ = text.rpartition(":")
    if colon and file.endswith(".py"):
        text = file
    if len(text) > 1000 or "\n" in text or not ("/" in text or Path(text).suffix):
        return None
    path = Path(text).expanduser()
    return path if os.path.exists(path) else None
