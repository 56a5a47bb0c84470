"""A system-call filter (seccomp-BPF) written by hand, so that no library is needed.

A deny list, as the second wall behind the namespaces: sockets, everything that could re-arrange
namespaces or mounts, kernel interfaces with a history of holes, and the shared-memory calls whose
pages no rlimit counts. `clone3` answers ENOSYS because its flags live in memory that a filter
cannot read: the C library then falls back to `clone`, whose flags it can.

Source: Linux Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_X86_64 = {
    "socket": 41, "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "syslog": 103,
    "personality": 135, "pivot_root": 155, "acct": 163, "settimeofday": 164, "mount": 165,
    "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "init_module": 175,
    "delete_module": 176, "quotactl": 179, "clock_settime": 227, "mq_open": 240,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "perf_event_open": 298, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "memfd_create": 319,
    "bpf": 321, "userfaultfd": 323, "chroot": 161, "clone": 56, "prctl": 157,
}  # fmt: skip
_AARCH64 = {
    "socket": 198, "shmget": 194, "semget": 190, "msgget": 186, "ptrace": 117, "syslog": 116,
    "personality": 92, "pivot_root": 41, "acct": 89, "settimeofday": 170, "mount": 40,
    "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142, "init_module": 105,
    "delete_module": 106, "quotactl": 60, "clock_settime": 112, "mq_open": 180,
    "kexec_load": 104, "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97,
    "perf_event_open": 241, "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268,
    "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273, "memfd_create": 279,
    "bpf": 280, "userfaultfd": 282, "chroot": 51, "clone": 220, "prctl": 167,
}  # fmt: skip
# From number 424 on, every architecture shares one table.
_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "clone3": 435, "pidfd_getfd": 438, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

_NEW_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARG0 = 0, 4, 16
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_DENY = 0x00050000 | errno.EPERM
_ABSENT = 0x00050000 | errno.ENOSYS


def call_number(name: str) -> int:
    """The number of the system call `name` on this machine; raises OSError if it is unknown."""
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOTSUP, f"no system-call table for {machine}")
    return _ARCHITECTURES[machine][1][name]


def _instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def build_filter(machine: str) -> bytes:
    """The BPF program for `machine` (`os.uname().machine`), 8 bytes an instruction.

    Raises:
        OSError: the architecture has no table here.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOTSUP, f"no system-call table for {machine}")
    arch, numbers = _ARCHITECTURES[machine]
    program = [
        _instruction(_LOAD, _OFFSET_ARCH),
        _instruction(_JUMP_EQ, arch, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _OFFSET_NR),
        # The x32 numbers of x86-64 would reach the same calls under other numbers.
        _instruction(_JUMP_GE, 0x40000000, 0, 1),
        _instruction(_RETURN, _DENY),
    ]
    for name, number in {**numbers, **_COMMON}.items():
        if name in ("clone", "prctl"):
            continue
        program += [
            _instruction(_JUMP_EQ, number, 0, 1),
            _instruction(_RETURN, _ABSENT if name == "clone3" else _DENY),
        ]
    for name, jump, value in (
        ("clone", _JUMP_SET, _NEW_NAMESPACE_FLAGS),
        ("prctl", _JUMP_EQ, _PR_SET_PDEATHSIG),  # else a program could outlive its supervisor
    ):
        program += [
            _instruction(_JUMP_EQ, numbers[name], 0, 4),
            _instruction(_LOAD, _OFFSET_ARG0),
            _instruction(jump, value, 0, 1),
            _instruction(_RETURN, _DENY),
            _instruction(_RETURN, _ALLOW),
        ]
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install_filter(libc: ctypes.CDLL) -> None:
    """Filters this process and all it starts, for good. NO_NEW_PRIVS must be set already."""
    code = build_filter(os.uname().machine)
    program = _Program(len(code) // 8, code)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp filter refused: {os.strerror(number)}")
