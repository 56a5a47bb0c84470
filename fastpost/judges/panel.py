"""Several judges that answer the same questions, heard by how far they agree.

A row that fewer than two judges answered is flagged: its score is one model's opinion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastpost.chat_model.usage import Estimate
from fastpost.judges.agreement import Scores, agreement_weights, weighted_scores
from fastpost.judges.judge import Judge, Texts, answer_rows
from fastpost.judges.position_bias import PositionBias
from fastpost.judges.tasks import Criterion, Grade, Rubric, Task

__all__ = ["Panel", "Verdict"]

FEWEST_JUDGES = 3
_FEWEST_VOTES = 2


@dataclass(frozen=True)
class Verdict:
    """What a panel says. `str()` is a report.

    Attributes:
        judges: names `[judges]`.
        values: `[rows]`, in [0, 1]; None where no judge answered.
        scores: `[judges][rows]`, what each said.
        weights: `[judges]`, which sum to 1.
        single_judged: `[rows]`, fewer than two judges answered.
        biases: `[judges]` for pairs, else empty.
        criteria: by name `[rows]`, of a rubric, else empty.
    """

    judges: list[str]
    values: list[float | None]
    scores: Scores
    weights: list[float]
    single_judged: list[bool]
    biases: list[PositionBias] = field(default_factory=list)
    criteria: dict[str, list[float | None]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = len(self.values)
        lines = [
            f"{rows} rows, {sum(v is None for v in self.values)} without a verdict, "
            f"{sum(self.single_judged)} with fewer than two"
        ]
        for i, name in enumerate(self.judges):
            answered = sum(score is not None for score in self.scores[i])
            line = f"  {name}: weight {self.weights[i]:.2f}, answered {answered} of {rows}"
            lines.append(line + (f"; {self.biases[i]}" if self.biases else ""))
        return "\n".join(lines)


class Panel:
    """Judges that are heard together.

    Args:
        judges: with names that differ.
        min_judges: fewer are refused; from three on, agreement tells the odd one out.

    Raises:
        ValueError: too few judges, or two of one name.
    """

    def __init__(self, judges: Sequence[Judge], *, min_judges: int = FEWEST_JUDGES) -> None:
        names = [judge.name for judge in judges]
        if len(judges) < max(1, min_judges):
            raise ValueError(
                f"{len(judges)} judges; give at least {max(1, min_judges)}. Two cannot tell which "
                "of them errs, and one is an opinion; min_judges=1 takes what there is"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"the judges are {names}; give each its own name")
        self.judges = list(judges)

    def grade(
        self,
        criteria: str,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        human: Sequence[float | None] | None = None,
    ) -> Verdict:
        """Grades in [0, 1]. `human`: labels on the same scale, None for rows without one.

        Raises:
            ValueError: lists of differing lengths.
        """
        rows = answer_rows(prompts, answers)
        return self._verdict([j.answer(Grade(criteria), rows) for j in self.judges], human)

    def rubric(
        self,
        criteria: Sequence[Criterion],
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        human: Sequence[float | None] | None = None,
    ) -> Verdict:
        """Weighted means over the criteria, and each criterion by itself in `Verdict.criteria`.

        Raises:
            ValueError: lists of differing lengths.
        """
        task, rows = Rubric(tuple(criteria)), answer_rows(prompts, answers)
        found = [judge.answer(task, rows) for judge in self.judges]
        means = [[None if g is None else task.mean(g) for g in judge] for judge in found]
        verdict = self._verdict(means, human)
        for criterion in criteria:
            grades = [[None if g is None else g[criterion.name] for g in judge] for judge in found]
            verdict.criteria[criterion.name] = weighted_scores(grades, verdict.weights)
        return verdict

    def prefer(
        self,
        criteria: str,
        prompts: Sequence[str],
        firsts: Sequence[str],
        seconds: Sequence[str],
        *,
        human: Sequence[float | None] | None = None,
    ) -> Verdict:
        """How far the first answer of each pair wins; each judge's position bias is measured.

        Raises:
            ValueError: lists of differing lengths.
        """
        found = [judge.prefer(criteria, prompts, firsts, seconds) for judge in self.judges]
        verdict = self._verdict([preferences.values for preferences in found], human)
        verdict.biases.extend(preferences.bias for preferences in found)
        return verdict

    def estimate(
        self, task: Task, rows: Sequence[Texts], *, seconds_per_call: float | None = None
    ) -> Estimate:
        """What the judges cost together, one after the other; pairs: give `both_orders(...)`."""
        first, *others = (
            judge.estimate(task, rows, seconds_per_call=seconds_per_call) for judge in self.judges
        )
        for other in others:
            first = first + other
        return first

    def _verdict(self, scores: list[list[Any]], human: Sequence[float | None] | None) -> Verdict:
        weights = agreement_weights(scores, human)
        votes = [sum(s is not None for s in row) for row in zip(*scores, strict=True)]
        return Verdict(
            [judge.name for judge in self.judges],
            weighted_scores(scores, weights),
            scores,
            [weight / sum(weights) for weight in weights],
            [count < _FEWEST_VOTES for count in votes],
        )
