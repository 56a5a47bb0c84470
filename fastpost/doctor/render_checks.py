"""Checks of what a template and tokenizer make of a row: one text, one sequence of tokens.

A row is rendered as each method does it:

    SFT, DPO   template(prompt + answer), tokenised once (TRL finds the answer by comparing it with
               the prompt's tokens)
    RL         template(prompt, add_generation_prompt=True), tokenised; then the tokens that the
               model samples, which are those of the answer on its own
    inference  as RL

Train and inference agree if the prompt's text begins the whole text, and all methods agree if the
tokens are the same too. Plain texts are joined without a template, everything else is the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from fastpost.doctor.data_finding import DataFinding, shorten
from fastpost.doctor.data_sample import Sample
from fastpost.guards.assistant_mask import render_with_mask
from fastpost.guards.mask import IGNORE_INDEX

__all__ = ["Rendered", "render"]

_FAILURES = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_AROUND = 60


@dataclass(frozen=True)
class Rendered:
    """A row's tokens under SFT or DPO, and which of them are scored."""

    row: int
    input_ids: list[int]
    labels: list[int]


def render(
    sample: Sample, tokenizer: Any, max_length: int | None
) -> tuple[list[Rendered], list[DataFinding]]:
    """A sample's answers as tokens, and what is wrong with them."""
    rendered, findings = [], []
    if sample.is_chat and tokenizer.chat_template is None:
        fix = "give the tokenizer a chat_template, or name the model that has it"
        what = "the rows are conversations and the tokenizer has no chat template"
        return [], [DataFinding("template", "error", None, what, "", fix)]
    if not sample.answers:
        return [], list(_refusals(sample, tokenizer, sample.prompt))
    for name, answer in sample.answers.items():
        try:
            if sample.is_chat:
                found = _chat(sample, name, answer, tokenizer)
            else:
                found = _plain(sample, name, answer, tokenizer)
        except _FAILURES as error:
            refusals = list(_refusals(sample, tokenizer, [*sample.prompt, *answer]))
            findings += refusals or [_no_mask(sample.row, error)]
            continue
        made, problems = found
        findings += problems
        rendered.append(made)
        findings += _scored_findings(made, tokenizer, max_length, name)
    return rendered, findings


def _chat(
    sample: Sample, name: str, answer: Any, tokenizer: Any
) -> tuple[Rendered, list[DataFinding]]:
    messages = [*sample.prompt, *answer]
    options = dict(sample.template_options)
    tools = options.pop("tools", None)

    def text_of(given: list[Any], with_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            given,
            tools=tools,
            tokenize=False,
            add_generation_prompt=with_prompt,
            **options,
        )

    whole, findings = text_of(messages, False), []
    whole_ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for turn in range(max(1, len(sample.prompt)), len(messages)):
        if messages[turn]["role"] == "assistant":
            prompt = text_of(messages[:turn], True)
            if not whole.startswith(prompt):
                findings.append(_parted(sample.row, prompt, whole))
                break
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            rest = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
            if differ := _unequal(sample.row, prompt_ids + rest, whole_ids, tokenizer):
                findings += differ
                break
    if findings and findings[0].check == "train = inference":
        # What is scored cannot be said; TRL would score from where the two part.
        return Rendered(sample.row, whole_ids, list(whole_ids)), findings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the unequal tokens are a finding already
        ids, mask = render_with_mask(
            tokenizer, messages, tools, scored_from=len(sample.prompt), **options
        )
    labels = [i if bit else IGNORE_INDEX for i, bit in zip(ids, mask, strict=True)]
    return Rendered(sample.row, ids, labels), findings


def _plain(
    sample: Sample, name: str, answer: str, tokenizer: Any
) -> tuple[Rendered, list[DataFinding]]:
    if not answer.endswith(tokenizer.eos_token or ""):
        answer += tokenizer.eos_token  # as TRL does for plain rows
    ids = list(tokenizer(sample.prompt + answer)["input_ids"])
    if name == "text":
        return Rendered(sample.row, ids, list(ids)), []
    prompt_ids = list(tokenizer(sample.prompt)["input_ids"])
    rest = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    findings = _unequal(sample.row, prompt_ids + rest, ids, tokenizer)
    start = _shared(prompt_ids, ids)
    labels = [IGNORE_INDEX] * start + ids[start:]
    return Rendered(sample.row, ids, labels), findings


def _refusals(sample: Sample, tokenizer: Any, messages: Any) -> Iterator[DataFinding]:
    """Whether the template refuses the conversation."""
    if not sample.is_chat:
        return
    try:
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not sample.answers,
            **sample.template_options,
        )
    except _FAILURES as error:
        roles = " -> ".join(str(message["role"]) for message in messages)
        yield DataFinding(
            "template",
            "error",
            sample.row,
            f"the chat template refuses the conversation: {error}",
            shorten(roles),
            "bring the turns into the order that the template takes",
        )


def _no_mask(row: int, error: Exception) -> DataFinding:
    message = str(error)
    what = "the answer cannot be told from its prompt in the rendered text"
    fix = "give prompt + completion rows, or a template with {% generation %} markers"
    return DataFinding("scored share", "error", row, what, shorten(message), fix)


def _parted(row: int, prompt: str, whole: str) -> DataFinding:
    at = _shared(prompt, whole)
    begin = max(0, at - _AROUND)
    return DataFinding(
        "train = inference",
        "error",
        row,
        "the prompt is rendered otherwise in training than at inference",
        f"inference: {prompt[begin : at + _AROUND]!r}\ntraining:  {whole[begin : at + _AROUND]!r}",
        "use a template that renders a prompt alike whatever follows; templates that drop earlier "
        "thinking, or add it to the generation prompt, do not",
    )


def _unequal(row: int, sampled: list[int], trained: list[int], tokenizer: Any) -> list[DataFinding]:
    if sampled == trained:
        return []
    at = _shared(sampled, trained)
    begin = max(0, at - 4)

    def shown(ids: list[int]) -> str:
        return str([tokenizer.decode([token]) for token in ids[begin : at + 4]])

    return [
        DataFinding(
            "SFT = DPO = RL",
            "warning",
            row,
            "SFT and DPO see other tokens than RL and inference where the answer begins",
            f"RL:  {shown(sampled)}\nSFT: {shown(trained)}",
            "strip white space at the edges of prompt and answer, or end the prompt with a special "
            "token, so that no token lies across the edge",
        )
    ]


def _scored_findings(
    made: Rendered, tokenizer: Any, max_length: int | None, name: str
) -> Iterator[DataFinding]:
    # The first token is never predicted.
    kept = made.labels[1:max_length]
    scored = sum(label != IGNORE_INDEX for label in kept)
    text = shorten(tokenizer.decode(made.input_ids))
    if scored == 0:
        cut = max_length is not None and len(made.input_ids) > max_length
        yield DataFinding(
            "scored share",
            "error",
            made.row,
            "no token is scored" + (f" within max_length={max_length}" if cut else ""),
            text,
            "raise max_length, or shorten the prompt" if cut else "drop the row, or add an answer",
        )
    elif scored == len(kept) and name != "text":
        yield DataFinding(
            "scored share",
            "warning",
            made.row,
            "every token is scored, the prompt's too",
            text,
            "give the answer a prompt",
        )


def _shared(one: Any, other: Any) -> int:
    """Length of what two sequences begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
