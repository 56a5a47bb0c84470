"""The engine's end of one jail: starts it, reads its pipes, kills it whole."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_START = "import sys; sys.path.append(sys.argv[1]); from jail.lockdown import main; main()"
_EMPTYING_SECONDS = 10.0  # only a stopped supervisor takes longer; it is then killed outright


class Jail:
    """One running jail and the reading ends of its pipes."""

    def __init__(
        self,
        python: str,
        config: dict[str, Any],
        pipes: Sequence[int] = (),
        stdin: str = "",
    ) -> None:
        ready, ready_in_jail = os.pipe()
        lives_in_jail, self.engine_lives = os.pipe()
        config |= {"ready": ready_in_jail, "engine_lives": lives_in_jail, "pipes": list(pipes)}
        config_file, stdin_file = (
            _memory_file(text) for text in (json.dumps(config), stdin)
        )  # in memory: no pump thread, nothing on disk
        inherited = [ready_in_jail, lives_in_jail, config_file, *pipes]
        try:
            self.process = subprocess.Popen(
                [python, "-I", "-S", "-B", "-X", "utf8", "-c", _START]
                + [str(Path(__file__).parent), str(config_file)],
                stdin=stdin_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inherited,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "HOME": "/box", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        except OSError:
            os.close(ready)
            os.close(self.engine_lives)
            raise
        finally:
            for descriptor in (*inherited, stdin_file):
                os.close(descriptor)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.streams = {
            "stdout": self.process.stdout.fileno(),
            "stderr": self.process.stderr.fileno(),
            "ready": ready,
        }
        self.ready = ready

    def kill(self) -> None:
        """Has the supervisor empty the jail; returns when every process in it is dead."""
        os.close(self.engine_lives)
        try:
            self.process.wait(_EMPTYING_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        os.close(self.ready)


def _memory_file(text: str) -> int:
    descriptor = os.memfd_create("fastpost")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def collect(
    streams: dict[str, int], until_closed: set[str], deadline: float, output_bytes: int
) -> tuple[dict[str, bytes], str | None]:
    """Reads all streams until those in `until_closed` end, the deadline passes or one floods."""
    received = {name: b"" for name in streams}
    waiting = set(until_closed)
    with selectors.DefaultSelector() as selector:
        for name, descriptor in streams.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                return received, "time"
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                received[key.data] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                    waiting.discard(key.data)
                elif key.data != "verdict" and len(received[key.data]) > output_bytes:
                    return received, "output"
    return received, None
