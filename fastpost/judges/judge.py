"""One chat model as a judge.

    row ─► instructions + delimited texts ─► model ─► strict parse ─► value
                         ▲                                  │ not the form asked for
                         └───── next seed, fresh marks ◄────┘ (up to `attempts` times, then None)

With a `CachedChatModel` every reply is found again by task, texts and seed; the random marks around
the texts do not count. A malformed reply is kept too: a run that goes on pays for none again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.estimate import estimate_calls
from fastpost.chat_model.interface import (
    ChatModel,
    ChoosingModel,
    Conversation,
    IdentifiedChatModel,
    ask_each,
    in_order,
)
from fastpost.chat_model.usage import Estimate
from fastpost.judges.delimiting import delimited
from fastpost.judges.position_bias import PositionBias, position_bias
from fastpost.judges.tasks import Comparison, Criterion, Grade, Propositions, Rubric, Task

__all__ = ["Judge", "Preferences", "both_orders"]

# Raise when the wording around a task changes: cached replies answered the old one.
_WORDING = 1

Texts = Mapping[str, str]


@dataclass(frozen=True)
class Preferences:
    """Verdicts on pairs.

    Attributes:
        values: how far the first answer of each pair wins: 1, 0, or ½ for a tie or a verdict that
            turns with the order; ¾ and ¼ where one order is a tie. None where a verdict is missing.
        bias: what the order did.
    """

    values: list[float | None]
    bias: PositionBias


class Judge:
    """A chat model that answers tasks in a strict form, or abstains.

    Args:
        model: whom to ask; a `CachedChatModel` repeats no call.
        name: for reports; None takes the model's name for itself.
        attempts: replies asked for one question before the judge abstains.
        seed: of the first attempt.
        weighs_choices: the reply is the likeliest of those that count, by the model's own
            probabilities, in the place of sampled text: even a small local model gives a verdict
            every time. For grades, pairs and up to four statements, by a `LocalChatModel`.

    Attributes:
        malformed: replies so far that had not the form asked for.
        missing: questions that got no reply.

    Raises:
        ValueError: `attempts` is below 1, neither judge nor model has a name, or the model cannot
            weigh choices.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        name: str | None = None,
        attempts: int = 3,
        seed: int = 0,
        weighs_choices: bool = False,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}; give at least 1")
        if name is None:
            if not isinstance(model, IdentifiedChatModel):
                raise ValueError("the model does not say its name; give the judge one")
            name = str(model.identity["model"])
        inner = model.model if isinstance(model, CachedChatModel) else model
        if weighs_choices and not isinstance(inner, ChoosingModel):
            raise ValueError(
                f"{type(inner).__name__} cannot weigh choices, which takes its probabilities; use "
                "a LocalChatModel, or leave weighs_choices out"
            )
        self.model, self.name, self.attempts, self.seed = model, name, attempts, seed
        self.weighs_choices = weighs_choices
        self.malformed = self.missing = 0

    def answer(self, task: Task, rows: Sequence[Texts]) -> list[Any]:
        """The task's value for each row; None where the judge abstains.

        Raises:
            ValueError: a row lacks a text, or holds something else; or choices are to be weighed
                and the task has too many.
        """
        for row in rows:
            _require_texts(task, row)
        # Rows that say the same, which groups of samples are full of, are one question.
        distinct: dict[tuple[str, ...], int] = {}
        numbers = [
            distinct.setdefault(tuple(row[name] for name in task.texts), len(distinct))
            for row in rows
        ]
        questions = [dict(zip(task.texts, texts, strict=True)) for texts in distinct]
        values = self._values(task, questions)
        return [values[number] for number in numbers]

    def _values(self, task: Task, rows: Sequence[Texts]) -> list[Any]:
        values: list[Any] = [None] * len(rows)
        open_rows = list(range(len(rows)))
        for attempt in range(self.attempts):
            if not open_rows:
                break
            replies = self._ask(task, [rows[i] for i in open_rows], self._seed(attempt))
            again = []
            for i, reply in zip(open_rows, replies, strict=True):
                if reply is None:
                    self.missing += 1
                    continue  # the model has retried itself
                try:
                    values[i] = task.value(reply)
                except ValueError:
                    self.malformed += 1
                    again.append(i)
            open_rows = again
        return values

    def grade(
        self, criteria: str, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[float | None]:
        """A grade in [0, 1] for each answer."""
        return self.answer(Grade(criteria), answer_rows(prompts, answers))

    def rubric(
        self, criteria: Sequence[Criterion], prompts: Sequence[str], answers: Sequence[str]
    ) -> list[dict[str, float] | None]:
        """A grade in [0, 1] by each criterion for each answer."""
        return self.answer(Rubric(tuple(criteria)), answer_rows(prompts, answers))

    def holds(
        self, statements: Sequence[str], prompts: Sequence[str], answers: Sequence[str]
    ) -> list[tuple[bool, ...] | None]:
        """Which statements are true of each answer."""
        return self.answer(Propositions(tuple(statements)), answer_rows(prompts, answers))

    def prefer(
        self,
        criteria: str,
        prompts: Sequence[str],
        firsts: Sequence[str],
        seconds: Sequence[str],
    ) -> Preferences:
        """Which answer of each pair is better, asked in both orders."""
        found = self.answer(Comparison(criteria), both_orders(prompts, firsts, seconds))
        verdicts = list(zip(found[::2], found[1::2], strict=True))
        values = [
            None if as_given is None or swapped is None else (as_given + 1 - swapped) / 2
            for as_given, swapped in verdicts
        ]
        return Preferences(values, position_bias(verdicts))

    def estimate(
        self, task: Task, rows: Sequence[Texts], *, seconds_per_call: float | None = None
    ) -> Estimate:
        """What `answer` will cost if every first reply has its form; nothing is asked."""
        for row in rows:
            _require_texts(task, row)
        return estimate_calls(
            self.model,
            [_conversation(task, row) for row in rows],
            seed=self._seed(0),
            cache_as=[_content(task, row) for row in rows],
            seconds_per_call=seconds_per_call,
        )

    def _seed(self, attempt: int) -> int:
        return self.seed * 1000 + attempt  # seeds of two judges do not overlap

    def _ask(self, task: Task, rows: Sequence[Texts], seed: int) -> list[str | None]:
        conversations = [_conversation(task, row) for row in rows]
        named = [_content(task, row) for row in rows]
        model = self.model
        if self.weighs_choices:
            choices = task.choices
            if choices is None:
                raise ValueError(
                    f"{type(task).__name__} has too many replies to weigh each; leave "
                    "weighs_choices out, or ask less at once"
                )
            if isinstance(model, CachedChatModel):
                return in_order(
                    model.stream_choices(conversations, choices, cache_as=named), len(rows)
                )
            assert isinstance(model, ChoosingModel)
            return in_order(model.stream_choices(conversations, choices), len(rows))
        if isinstance(model, CachedChatModel):
            return model(conversations, seed=seed, cache_as=named)
        return in_order(ask_each(model, conversations, seed=seed), len(rows))


def answer_rows(prompts: Sequence[str], answers: Sequence[str]) -> list[Texts]:
    """Rows of tasks about one answer."""
    return [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]


def both_orders(
    prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
) -> list[Texts]:
    """Two rows of a `Comparison` for each pair: as given, then swapped."""
    rows: list[Texts] = []
    for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
        rows.append({"prompt": prompt, "answer_A": first, "answer_B": second})
        rows.append({"prompt": prompt, "answer_A": second, "answer_B": first})
    return rows


def _conversation(task: Task, row: Texts) -> Conversation:
    texts = {name: row[name] for name in task.texts}
    return [{"role": "user", "content": delimited(task.instructions, texts, task.form)}]


def _content(task: Task, row: Texts) -> Any:
    """What a question is found by: everything but its marks."""
    texts = [row[name] for name in task.texts]
    return ["judge", _WORDING, task.instructions, task.form, texts]


def _require_texts(task: Task, row: Texts) -> None:
    for name in task.texts:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} is {row.get(name)!r}; give a text")
