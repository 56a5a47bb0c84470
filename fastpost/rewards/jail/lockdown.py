"""Turns a fresh Python process into a jail, then runs one role in it.

Two processes. The *supervisor* (the one that was started) enters new user, network, PID, mount and
IPC namespaces and forks. Its child is process 1 of the new PID namespace, so the kernel kills
every process of the jail, daemons included, the moment it ends. The child builds a root of its own
(read-only system folders, one size-limited tmpfs to write in, no /proc), gives up all privileges,
sets the rlimits and filters, says "ready" and only then lets foreign code run.

The order of death is a chain: engine dead -> supervisor killed -> process 1 killed -> jail empty.

Started by root, the jail uses real namespaces and an unprivileged uid, because Linux does not count
root's processes against RLIMIT_NPROC; started by anyone else, a user namespace.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
from itertools import pairwise
from typing import Any

from . import driver, landlock, seccomp, solution

BOX = "/box"  # the one writable folder
_NEW_USER, _NEW_OTHERS = 0x10000000, 0x20000 | 0x8000000 | 0x20000000 | 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY = 442, -100, 0x8000, 1
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (os.fsencode(text) for text in (source, target, kind))
    _check(
        _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data)),
        f"mount {source} on {target}",
    )


def _set_read_only(path: str, read_only: bool, flags: int) -> None:
    bit = _ATTR_READ_ONLY
    attributes = struct.pack("=4Q", bit if read_only else 0, 0 if read_only else bit, 0, 0)
    result = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, ctypes.c_size_t(32)
    )
    _check(result, f"mount_setattr {path} (needs Linux 5.12)")


def _enter_namespaces(is_root: bool) -> None:
    uid, gid = os.getuid(), os.getgid()
    flags = _NEW_OTHERS if is_root else _NEW_OTHERS | _NEW_USER
    _check(_libc.unshare(flags), "unshare of user, network, PID, mount and IPC namespaces")
    if is_root:
        return
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _bind(path: str, root: str) -> None:
    """Shows `path` of the host at the same place below `root`; a link stays a link."""
    if os.path.lexists(root + path) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    kind = os.lstat(path).st_mode
    if stat.S_ISLNK(kind):
        os.symlink(os.readlink(path), root + path)
        return
    if stat.S_ISDIR(kind):
        os.mkdir(root + path)
    else:
        os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
    _mount(path, root + path, "", _MS_BIND | _MS_REC)


def _build_root(readable: list[str], box_bytes: int) -> None:
    root = "/proc"  # exists everywhere, is needed by nothing below, and the jail must not have it
    _mount("", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in [*readable, *_DEVICES]:
        _bind(path, root)
    os.mkdir(root + BOX)
    options = f"size={box_bytes},nr_inodes=4096,mode=777"
    _mount("tmpfs", root + BOX, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(root)
    _check(_libc.syscall(seccomp.call_number("pivot_root"), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    _set_read_only("/", True, _AT_RECURSIVE)
    _set_read_only(BOX, False, 0)
    os.chdir(BOX)


def _drop_privileges(unprivileged_uid: int | None) -> None:
    if unprivileged_uid is not None:
        os.setgroups([])
        os.setresgid(unprivileged_uid, unprivileged_uid, unprivileged_uid)
        os.setresuid(unprivileged_uid, unprivileged_uid, unprivileged_uid)
    header, empty = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, empty), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _die_with_parent(parent_lives: int) -> None:
    """`parent_lives` is the reading end of a pipe that only the parent can write to."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent-death signal")
    watch = select.poll()
    watch.register(parent_lives, select.POLLHUP)
    if watch.poll(0):
        os._exit(1)  # the parent died before the signal was asked for


def _supervise(child: int, engine_lives: int) -> None:
    """Waits for process 1, killing it when the engine lets go, and passes its status on.

    The kernel reports process 1 dead only once every process of its namespace is, so the end of
    this process means an empty jail. It holds no pipe of the jail open meanwhile.
    """
    ended = os.pidfd_open(child)
    watch = select.poll()
    watch.register(ended, select.POLLIN)
    watch.register(engine_lives, select.POLLHUP)
    if ended not in dict(watch.poll()):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _close_all_but(kept: list[int]) -> None:
    limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536)
    edges = [-1, *sorted(kept), limit]
    for low, high in pairwise(edges):
        if high > low + 1:  # CPython takes the empty range (0, 0) for "everything"
            os.closerange(low + 1, high)


def _seal(config: dict[str, Any], unprivileged_uid: int | None, supervisor_lives: int) -> None:
    """Everything that must hold before foreign code runs; raises OSError if any of it does not."""
    _build_root(config["readable"], config["box_bytes"])
    _drop_privileges(unprivileged_uid)
    _die_with_parent(supervisor_lives)
    os.umask(0o077)
    for name, value in config["rlimits"].items():
        kind = getattr(resource, name)
        ceiling = resource.getrlimit(kind)[1]
        lowest = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (lowest, lowest))
    landlocked = landlock.allow_writes_only_below(_libc, BOX, _DEVICES)
    seccomp.install_filter(_libc)
    ready = config["ready"]
    os.write(ready, b"landlock" if landlocked else b"no landlock")
    for descriptor in (ready, supervisor_lives):
        os.close(descriptor)


def main() -> None:
    """`argv`: folder of the package `jail`, descriptor of the JSON config."""
    folder, config_file = sys.argv[1:]
    with open(int(config_file)) as file:
        config = json.load(file)
    sys.path.remove(folder)
    engine_lives = config.pop("engine_lives")
    inherited = [0, 1, 2, config["ready"], *config["pipes"]]
    try:
        _close_all_but([*inherited, engine_lives])
        _die_with_parent(engine_lives)
        uid = 60000 + os.getpid() % 5000 if os.geteuid() == 0 else None
        _enter_namespaces(is_root=uid is not None)
        supervisor_lives, supervisor_end = os.pipe()
        child = os.fork()
        if child:
            _close_all_but([supervisor_end, engine_lives])
            _supervise(child, engine_lives)
        os.close(supervisor_end)
        os.close(engine_lives)
        _seal(config, uid, supervisor_lives)
    except (OSError, ValueError) as error:
        os.write(config["ready"], f"failed: {error}".encode())
        os._exit(1)
    sys.argv = ["program.py"]
    if config["role"] == "program":
        solution.run_program(config["source"])
    elif config["role"] == "solution":
        solution.serve(config["source"], *config["pipes"])
    else:
        driver.run_tests(config["tests"], config["entry_point"], *config["pipes"])
