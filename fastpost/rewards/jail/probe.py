"""The hostile program that a Sandbox runs at construction; prints what was refused, as JSON."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable


def refused(action: Callable[..., object], *arguments: object) -> bool:
    try:
        action(*arguments)
    except OSError:
        return True
    return False


def process_limit_holds() -> bool:
    """Forks sleepers until refused; they die with this process."""
    try:
        for _ in range(resource.getrlimit(resource.RLIMIT_NPROC)[0] + 1):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
    except OSError:
        return True
    return False


def main() -> None:
    """Standard input: JSON `[path of a writable file outside, pid of the engine]`."""
    target, engine = json.load(sys.stdin)
    library = os.__file__
    writes = [
        *(os.statvfs(path).f_flag & os.ST_RDONLY for path in ("/", "/usr", library)),
        refused(open, target, "w"),
        refused(os.unlink, target),
        refused(os.rename, target, target + "2"),
        refused(os.chmod, target, 0),
        refused(os.chmod, library, os.stat(library).st_mode),
        refused(open, library, "a"),
        refused(open, "/planted", "w"),
        refused(os.mkdir, "/usr/planted"),
    ]
    report = {
        "network isolated": refused(socket.socket),
        "writes confined": all(writes),
        "own folder writable": not refused(open, "/box/own", "w"),
        "host files hidden": refused(open, target) and refused(os.listdir, "/proc/1"),
        "signals confined": os.getpid() == 1 and refused(os.kill, engine, 0),
        "privileges dropped": os.geteuid() != 0 and refused(os.setuid, 0),
        "processes limited": process_limit_holds(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
