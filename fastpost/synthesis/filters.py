"""Which synthetic rows stay, and why the others go.

Checks run in the order of their cost: reply cut off, empty, length, refusal, script, the same
prompt again, a nearly equal prompt, and last the judges. A row is dropped by the first it fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastpost.chat_model.interface import Conversation
from fastpost.chat_model.usage import Estimate
from fastpost.data.languages import UNDETERMINED, main_language, require_languages
from fastpost.data.near_duplicates import NearDuplicates
from fastpost.data.rows import Row
from fastpost.data.units import words
from fastpost.judges.judge import answer_rows
from fastpost.judges.panel import Panel
from fastpost.judges.tasks import Grade
from fastpost.rewards.judge import prompt_text
from fastpost.rewards.rules import no_refusal

__all__ = ["Filters", "JudgeFilter", "SynthesisReport", "drop_repeated", "drop_unliked"]

_NO_REFUSAL = no_refusal()
_SHOWN = 100
_TEXT = 400  # characters


@dataclass(frozen=True)
class JudgeFilter:
    """Rows stay whose last answer judges grade at `min_score` or more, in [0, 1]."""

    panel: Panel
    criteria: str
    min_score: float

    def __post_init__(self) -> None:
        if not 0 < self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}; give a grade above 0, at most 1")

    def estimate(self, rows: int, seconds_per_call: float | None = None) -> Estimate:
        """At most what judging `rows` rows costs, a prompt and an answer taken to have 400
        characters each; nothing is asked."""
        texts = [f"{number} ".ljust(_TEXT, "x") for number in range(rows)]
        return self.panel.estimate(
            Grade(self.criteria), answer_rows(texts, texts), seconds_per_call=seconds_per_call
        )


@dataclass(frozen=True)
class Filters:
    """What a row must fulfil.

    Attributes:
        min_words, max_words: of every answer, as `fastpost.data.units.words` counts.
        languages: ISO 639 codes of which every prompt and answer must be in one, such as ("en",).
            Empty takes any; a text too short to tell, numbers and code always fit.
        drop_refusals: no answer has a stock phrase of refusal (English).
        near_duplicates: Jaccard similarity of the first prompt's word 5-grams with those of an
            earlier row from which a row goes; None compares words exactly, and nothing more.
        judge: a least grade.

    Raises:
        ValueError: values out of their range.
    """

    min_words: int = 1
    max_words: int | None = None
    languages: tuple[str, ...] = ()
    drop_refusals: bool = True
    near_duplicates: float | None = 0.8
    judge: JudgeFilter | None = None

    def __post_init__(self) -> None:
        if self.min_words < 0 or (self.max_words is not None and self.max_words < self.min_words):
            raise ValueError(
                f"min_words {self.min_words} and max_words {self.max_words} leave no length"
            )
        require_languages(self.languages)
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(
                f"near_duplicates is {self.near_duplicates}; give a similarity above 0, at most 1"
            )

    def complaint(self, messages: Conversation) -> str | None:
        """Why turns are dropped by themselves; None where they are not."""
        for message in messages:
            if message["role"] not in ("user", "assistant"):
                continue
            text = message["content"]
            count = len(words(text))
            if not count:
                return f"empty {message['role']} turn"
            if message["role"] == "assistant":
                if count < self.min_words:
                    return f"answer below {self.min_words} words"
                if self.max_words is not None and count > self.max_words:
                    return f"answer above {self.max_words} words"
                if self.drop_refusals and not _NO_REFUSAL.holds(text):
                    return "refusal"
            language = main_language(text) if self.languages else UNDETERMINED
            if language not in (*self.languages, UNDETERMINED):
                return f"language {language}"
        return None


@dataclass
class SynthesisReport:
    """What became of a run's candidates. `str()` is what a command prints.

    Attributes:
        asked: candidates.
        kept: rows.
        missing: questions that got no reply; another run asks for these again.
        dropped: rows by what they failed.
        examples: a dropped text for each.
        notes: lines of what else was found.
    """

    asked: int = 0
    kept: int = 0
    missing: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, why: str, text: str) -> None:
        """Counts a dropped row."""
        self.dropped[why] += 1
        self.examples.setdefault(why, text[:_SHOWN])

    def __str__(self) -> str:
        lines = [f"{self.kept:,} rows of {self.asked:,} candidates"]
        for why, count in self.dropped.most_common():
            lines.append(f"  {count:,} dropped, {why}: {self.examples[why]!r}")
        if self.missing:
            lines.append(
                f"  {self.missing:,} questions got no reply; the same command asks them again"
            )
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def first_prompt(messages: Conversation) -> str:
    """The text of the first user turn."""
    return next((m["content"] for m in messages if m["role"] == "user"), "")


def drop_repeated(
    candidates: Iterable[Conversation], filters: Filters, report: SynthesisReport
) -> list[int]:
    """Places of conversations whose first prompt no earlier one says, or nearly says."""
    texts = [first_prompt(messages) for messages in candidates]
    seen: set[str] = set()
    fresh = []
    for place, text in enumerate(texts):
        said = " ".join(words(text))
        if said in seen:
            report.drop("repeated prompt", text)
        else:
            fresh.append(place)
        seen.add(said)
    if filters.near_duplicates is None:
        return fresh
    index = NearDuplicates(filters.near_duplicates)
    for place in fresh:
        index.add(place, texts[place])
    repeated = {pair.row for pair in index.pairs(lambda place: texts[place])}
    for place in sorted(repeated):
        report.drop("nearly repeated prompt", texts[place])
    return [place for place in fresh if place not in repeated]


def drop_unliked(rows: list[Row], filters: Filters, report: SynthesisReport) -> list[Row]:
    """Rows that the judges like; those they do not grade go too. The report says who judged."""
    judge = filters.judge
    if judge is None or not rows:
        return rows
    prompts = [prompt_text(row["messages"][:-1]) for row in rows]
    answers = [row["messages"][-1]["content"] for row in rows]
    verdict = judge.panel.grade(judge.criteria, prompts, answers)
    kept = []
    for row, answer, score in zip(rows, answers, verdict.values, strict=True):
        if score is None:
            report.drop("no judge answered", answer)
        elif score < judge.min_score:
            report.drop(f"judged below {judge.min_score:g}", answer)
        else:
            kept.append(row)
    report.notes += [f"judges: {line.strip()}" for line in str(verdict).splitlines()]
    return kept
