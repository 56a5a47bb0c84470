"""Landlock: nothing outside one folder can be written, whatever the mount table says.

A third wall behind read-only mounts. It is used where the kernel has it (5.13 and later) and its
absence is reported, not fatal: the mounts alone already confine writes, `chmod` included, which
Landlock does not cover.

Source: Linux Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_WRITE_FILE = 1 << 1
_CHANGE_TREE = 0x1FF0  # remove and make of every file type, bits 4-12
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # since ABI 2 and 3


def abi_version(libc: ctypes.CDLL) -> int:
    """The kernel's Landlock ABI, 0 where there is none."""
    return max(0, libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG))


def allow_writes_only_below(libc: ctypes.CDLL, folder: str, devices: list[str]) -> bool:
    """Denies every change outside `folder`, but for writes to `devices`; False without Landlock."""
    version = abi_version(libc)
    if version == 0:
        return False
    rights = _WRITE_FILE | _CHANGE_TREE
    rights |= _REFER if version >= 2 else 0
    rights |= _TRUNCATE if version >= 3 else 0
    attributes = struct.pack("=Q", rights)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset failed")
    for path, allowed in [(folder, rights), *((device, _WRITE_FILE) for device in devices)]:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, opened)
        failed = libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        os.close(opened)
        if failed:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule failed for {path}")
    if libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self failed")
    os.close(ruleset)
    return True
