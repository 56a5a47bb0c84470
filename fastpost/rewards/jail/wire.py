"""Plain data over a pipe: what the tests and the program under test may say to each other.

One JSON line a message, at most `MESSAGE_BYTES`. Only exact built-in types come out of `decode`,
so that a program cannot hand a test an object whose `__eq__` says yes to everything. Anything else
travels as a handle: a number that stands for an object which stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO

MESSAGE_BYTES = 4 << 20


def encode(value: Any, handle_of: Callable[[Any], int]) -> Any:
    """`value` as JSON; every dict in the result is a tag. `handle_of` numbers the objects."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):  # hexadecimal: no limit on digits, linear time
        return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, handle_of) for item in value]
    if isinstance(value, dict):
        pairs = [[encode(k, handle_of), encode(v, handle_of)] for k, v in value.items()]
        return {"dict": pairs}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(item, handle_of) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"handle": handle_of(value)}


def decode(message: Any, object_of: Callable[[int], Any]) -> Any:
    """The inverse of `encode`; raises ValueError for anything `encode` does not produce."""
    if message is None or isinstance(message, bool | int | float | str):
        return message
    if isinstance(message, list):
        return [decode(item, object_of) for item in message]
    if not isinstance(message, dict) or len(message) != 1:
        raise ValueError("malformed message")
    ((tag, body),) = message.items()
    if tag == "int":
        return int(body, 16)
    if tag == "dict":
        return {decode(k, object_of): decode(v, object_of) for k, v in body}
    if tag in ("tuple", "set", "frozenset"):
        kind = {"tuple": tuple, "set": set, "frozenset": frozenset}[tag]
        return kind(decode(item, object_of) for item in body)
    if tag in ("bytes", "bytearray"):
        raw = bytes.fromhex(body)
        return raw if tag == "bytes" else bytearray(raw)
    if tag == "complex":
        return complex(*body)
    if tag == "handle" and type(body) is int:
        return object_of(body)
    raise ValueError("malformed message")


def send(pipe: BinaryIO, message: Any) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    """The next message, None at the end; raises ValueError when it is too long or not JSON."""
    line = pipe.readline(MESSAGE_BYTES)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise ValueError("message too long or cut off")
    return json.loads(line)
