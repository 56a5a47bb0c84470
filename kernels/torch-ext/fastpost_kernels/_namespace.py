"""The namespace of this package's torch ops.

A Hub loader imports a private copy of this package beside an installed one. Two copies registering
the same op name in one process crash it, so the namespace is the import name of *this* copy:
`fastpost_kernels` when installed, the loader's unique id when it comes from the Hub. Its builder
would generate an `_ops.py` with the same function; a plain install has no builder, hence this file.
"""

from __future__ import annotations

__all__ = ["add_op_namespace_prefix"]

NAMESPACE = (__package__ or "fastpost_kernels").replace(".", "_")


def add_op_namespace_prefix(name: str) -> str:
    """`"linear_logprob_fwd"` -> `"<this copy's namespace>::linear_logprob_fwd"`."""
    return f"{NAMESPACE}::{name}"
