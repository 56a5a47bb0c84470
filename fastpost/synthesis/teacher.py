"""A teacher model writes questions on seed topics, and answers them.

    topic ─► "write n questions" ─► JSON list, strict, asked again ─► filters ─► answers ─► filters

Any `ChatModel` serves. Source of the idea: Self-Instruct, Wang 2022, arXiv:2212.10560; here topics
stand in the place of its seed tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastpost.chat_model.estimate import estimate_calls
from fastpost.chat_model.interface import ChatModel, Conversation, ask_each
from fastpost.chat_model.usage import Estimate
from fastpost.data.rows import Row
from fastpost.judges.tasks import read_object
from fastpost.synthesis.filters import Filters, SynthesisReport, drop_repeated, drop_unliked
from fastpost.synthesis.provenance import model_identity, sourced_row, sub_seed

__all__ = ["estimate_teacher", "teach"]

_ATTEMPTS = 3
# What a question is taken to be long for the estimate, in characters.
_QUESTION = 400


def teach(
    model: ChatModel,
    topics: Sequence[str],
    *,
    per_topic: int,
    seed: int = 0,
    source: str = "topics",
    filters: Filters | None = None,
) -> tuple[list[Row], SynthesisReport]:
    """Questions on topics, with their answers.

    Args:
        model: the teacher.
        topics: a few words or sentences each.
        per_topic: questions on each.
        seed: decides every sample.
        source: what the provenance calls the topics.
        filters: None takes the defaults of `Filters`.

    Returns:
        Rows {"messages", "provenance"} and the report.

    Raises:
        TypeError: the model does not say what it is.
        ValueError: no topics, an empty one, or `per_topic` is below 1.
    """
    _require(topics, per_topic)
    identity, filters = model_identity(model), filters or Filters()
    report = SynthesisReport(asked=len(topics) * per_topic)
    talks: list[Conversation] = []
    sources: list[str] = []
    for number, questions in enumerate(_questions(model, topics, per_topic, seed, report)):
        for question in questions:
            talk = [{"role": "user", "content": question.strip()}]
            complaint = filters.complaint(talk)
            if complaint is None:
                talks.append(talk)
                sources.append(f"{source}#{number}: {topics[number]}")
            else:
                report.drop(complaint, question)
    fresh = drop_repeated(talks, filters, report)
    talks, sources = [talks[place] for place in fresh], [sources[place] for place in fresh]
    answer_seed = sub_seed(seed, "teacher answer")
    answers = dict(ask_each(model, talks, seed=answer_seed))
    rows = []
    for place, talk in enumerate(talks):
        reply = answers.get(place)
        if reply is None:
            report.missing += 1
            continue
        messages = [*talk, {"role": "assistant", "content": reply.text.strip()}]
        complaint = filters.complaint(messages)
        if not reply.is_whole:
            complaint = "answer cut off at max_tokens"
        if complaint is not None:
            report.drop(complaint, reply.text)
            continue
        rows.append(
            sourced_row(
                messages,
                method="teacher",
                model=identity,
                seed=answer_seed,
                prompt_source=sources[place],
            )
        )
    rows = drop_unliked(rows, filters, report)
    report.kept = len(rows)
    return rows, report


def estimate_teacher(
    model: ChatModel,
    topics: Sequence[str],
    *,
    per_topic: int,
    seed: int = 0,
    seconds_per_call: float | None = None,
) -> Estimate:
    """At most what `teach` costs, malformed lists apart; nothing is asked. A question is taken to
    have 400 characters.

    Raises:
        ValueError: as `teach`.
    """
    _require(topics, per_topic)
    asked = [_request(topic, per_topic) for topic in topics]
    answered: list[Conversation] = [
        [{"role": "user", "content": "x" * _QUESTION}] for _ in range(len(topics) * per_topic)
    ]
    listing = estimate_calls(
        model, asked, seed=sub_seed(seed, "teacher", 0), seconds_per_call=seconds_per_call
    )
    # By number: questions are not known yet, so none of these can be in the cache.
    answering = estimate_calls(
        model,
        answered,
        seed=seed,
        cache_as=[["unknown question", number] for number in range(len(answered))],
        seconds_per_call=seconds_per_call,
    )
    return listing + answering


def _questions(
    model: ChatModel, topics: Sequence[str], count: int, seed: int, report: SynthesisReport
) -> list[list[str]]:
    """Questions by topic; none where the teacher does not keep to the form."""
    found: list[list[str]] = [[] for _ in topics]
    waiting = list(range(len(topics)))
    for attempt in range(_ATTEMPTS):
        requests = [_request(topics[place], count) for place in waiting]
        replies = dict(ask_each(model, requests, seed=sub_seed(seed, "teacher", attempt)))
        again = []
        for number, place in enumerate(waiting):
            reply = replies.get(number)
            if reply is None:
                report.missing += 1
                continue
            try:
                found[place] = _listed(reply.text)[:count]
            except ValueError as error:
                again.append(place)
                if attempt + 1 == _ATTEMPTS:
                    report.drop("topic without a list of questions", f"{topics[place]}: {error}")
        waiting = again
        if not waiting:
            break
    return found


def _request(topic: str, count: int) -> Conversation:
    return [
        {
            "role": "user",
            "content": f"Write {count} different questions or tasks that a user could give to an "
            f"assistant, on this topic: {topic}\n\nVary subject, length and difficulty; each must "
            'be understood by itself. Reply with {"questions": ["...", "..."]} alone, '
            f"{count} texts in the list.",
        }
    ]


def _listed(reply: str) -> list[str]:
    questions = read_object(reply, ["questions"])["questions"]
    if not isinstance(questions, list) or not all(isinstance(q, str) for q in questions):
        raise ValueError(f"expected a list of texts, got {json.dumps(questions)[:100]}")
    return questions


def _require(topics: Sequence[str], per_topic: int) -> None:
    if isinstance(topics, str) or not topics:
        raise ValueError("no topics; give a list of at least one")
    for number, topic in enumerate(topics):
        if not isinstance(topic, str) or not topic.strip():
            raise ValueError(f"topic {number} is {topic!r}; give a text")
    if per_topic < 1:
        raise ValueError(f"per_topic is {per_topic}; give at least 1")
