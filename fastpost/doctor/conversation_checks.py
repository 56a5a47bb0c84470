"""Checks of what a row says, before any template: roles and their order, empty turns, markers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from fastpost.doctor.data_finding import DataFinding, shorten
from fastpost.doctor.data_sample import Sample

__all__ = ["conversation_findings"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_USUAL_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def conversation_findings(sample: Sample, markers: Collection[str]) -> Iterator[DataFinding]:
    """What is wrong with a sample's turns.

    Args:
        sample: a row.
        markers: texts that the tokenizer reads as special tokens.
    """
    if sample.is_chat:
        for name, answer in sample.answers.items() or [("prompt", [])]:
            yield from _turns(sample, name, [*sample.prompt, *answer])
    else:
        for name, text in {"prompt": sample.prompt, **sample.answers}.items():
            if not text.strip() and not (name == "prompt" and "text" in sample.answers):
                yield _empty(sample.row, f"the {name}", repr(text), is_learnt=name != "prompt")
    chosen, rejected = (sample.answers.get(name) for name in ("chosen", "rejected"))
    if chosen is not None and chosen == rejected:
        yield DataFinding(
            "preference",
            "error",
            sample.row,
            "chosen and rejected are the same",
            shorten(str(chosen)),
            "drop the row: it teaches nothing, and its loss never falls",
        )
    yield from _markers(sample, markers)


def _turns(sample: Sample, name: str, messages: list[dict[str, Any]]) -> Iterator[DataFinding]:
    def roles(
        level: Any, what: str, fix: str, text: str = " -> ".join(str(m["role"]) for m in messages)
    ) -> DataFinding:
        return DataFinding("roles", level, sample.row, what, shorten(text), fix)

    last = None
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            known = _USUAL_NAMES.get(str(role).lower())
            fix = f"rename it to {known!r}" if known else f"use one of {', '.join(ROLES)}"
            yield roles("error", f"the role {role!r} is unknown", fix)
        if role == "system" and index > 0:
            fix = "put the system text into the first message"
            yield roles("warning", "a system turn stands after the beginning", fix)
        if role == last and role in ("user", "assistant"):
            yield roles("warning", f"two {role} turns in a row", "join them into one turn")
        if role == "assistant" and last in (None, "system", "developer"):
            fix = "begin with a user turn: at inference there always is one"
            yield roles("warning", "the assistant speaks before any user", fix)
        is_empty = not content or (isinstance(content, str) and not content.strip())
        if is_empty and not message.get("tool_calls"):
            place = f"message {index} ({role})"
            yield _empty(sample.row, f"a turn of the {role}", place, role == "assistant")
        last = role
    if sample.answers and last != "assistant":
        fix = "end with the answer; what follows it is never learnt"
        yield roles("warning", f"the {name} do not end with an assistant turn", fix)
    if not sample.answers and last == "assistant":
        fix = "end the prompt with the user's turn, and let the model answer"
        yield roles("error", "the prompt ends with an assistant turn", fix)


def _empty(row: int, what: str, text: str, is_learnt: bool) -> DataFinding:
    return DataFinding(
        "empty turns",
        "error" if is_learnt else "warning",
        row,
        f"{what} is empty",
        text,
        "drop the row" + (": it teaches the model to say nothing" if is_learnt else ", or fill it"),
    )


def _markers(sample: Sample, markers: Collection[str]) -> Iterator[DataFinding]:
    """Special tokens written out; a plain text may be a whole conversation, rendered before."""
    if not sample.is_chat:
        return
    for message in [*sample.prompt, *(m for answer in sample.answers.values() for m in answer)]:
        content = message["content"]
        found = [m for m in markers if isinstance(content, str) and m in content]
        if found:
            at = content.index(found[0])
            yield DataFinding(
                "BOS/EOS/pad",
                "error",
                sample.row,
                f"a turn's text holds {found[0]!r}, which becomes the special token itself",
                shorten(content[max(0, at - 80) : at + 80]),
                "remove it from the text: the template writes such tokens where they belong",
            )
