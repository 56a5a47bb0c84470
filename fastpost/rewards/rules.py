"""Explicit rules, each 0 to 1, summed by weight: R = Σ_k w_k · rule_k(prompt, completion).

Written in Python or in a rule file, for example:

    - {kind: length, weight: 0.2, max_words: 200}
    - {kind: pattern, weight: 1.0, regex: '<answer>.*</answer>', name: has an answer}
    - {kind: forbids, weight: 0.5, phrases: [as an AI]}
    - {kind: cites, weight: 0.5, min_count: 1}
    - {kind: no_refusal, weight: 1.0}
    - {kind: judged, weight: -1.0, statement: The answer lectures the reader.}

A check is 0 or 1. A judged rule is the share of the judges, weighted by agreement, that hold its
statement for true of the answer; a judge is asked about all statements at once. A row that no judge
answers has no reward (None).

Rule-based rewards with graded propositions: arXiv:2411.01111, eq. 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fastpost.judges.agreement import combine_by_agreement
from fastpost.judges.judge import Judge

from .completion import Completion, completion_text
from .judge import prompt_text

_REFUSALS = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable to|not able to)\b"
    r"|\bI (?:can(?:'|no)t|cannot|won't|will not) (?:help|assist|provide|do that|comply)\b"
    r"|\bas an AI\b",
    re.IGNORECASE,
)
_CITATION = re.compile(r"\[\d+\]|\[[^\]\n]+\]\(https?://[^)\s]+\)")


@dataclass(frozen=True)
class Rule:
    """One rule: `holds(text)` earns `weight`, which may be negative."""

    name: str
    holds: Callable[[str], bool]
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require_weight(self.name, self.weight)


@dataclass(frozen=True)
class JudgedRule:
    """One rule that judges decide: `statement` being true of the answer earns `weight`."""

    name: str
    statement: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require_weight(self.name, self.weight)
        if not isinstance(self.statement, str) or not self.statement.strip():
            raise ValueError(f"rule {self.name}: statement is {self.statement!r}; give a sentence")


def _require_weight(name: str, weight: Any) -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight == 0:
        raise ValueError(f"rule {name}: weight is {weight!r}; give a number but 0")


def length(weight: float = 1.0, *, min_words: int = 0, max_words: int = 1 << 31) -> Rule:
    """The number of words lies in [min_words, max_words]."""
    if not 0 <= min_words <= max_words:
        raise ValueError(f"min_words {min_words} and max_words {max_words} leave no length")
    name = f"{min_words} to {max_words} words"
    return Rule(name, lambda text: min_words <= len(text.split()) <= max_words, weight)


def pattern(weight: float = 1.0, *, regex: str) -> Rule:
    """`regex` is found; the dot matches new lines. Raises ValueError for a bad expression."""
    try:
        compiled = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex {regex!r} is not valid: {error}") from error
    return Rule(f"matches {regex!r}", lambda text: compiled.search(text) is not None, weight)


def _phrases(phrases: Sequence[str]) -> list[str]:
    if isinstance(phrases, str) or not phrases or not all(isinstance(p, str) for p in phrases):
        raise ValueError(f"phrases is {phrases!r}; give a list of strings")
    return [phrase.casefold() for phrase in phrases]


def contains(weight: float = 1.0, *, phrases: Sequence[str]) -> Rule:
    """All `phrases` occur, upper and lower case alike."""
    wanted = _phrases(phrases)
    name = f"contains {', '.join(phrases)}"
    return Rule(name, lambda text: all(p in text.casefold() for p in wanted), weight)


def forbids(weight: float = 1.0, *, phrases: Sequence[str]) -> Rule:
    """None of `phrases` occurs."""
    unwanted = _phrases(phrases)
    name = f"without {', '.join(phrases)}"
    return Rule(name, lambda text: not any(p in text.casefold() for p in unwanted), weight)


def cites(weight: float = 1.0, *, min_count: int = 1) -> Rule:
    """At least `min_count` different citations: `[3]` or `[title](https://…)`."""
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}; give at least 1")
    name = f"cites {min_count} or more"
    return Rule(name, lambda text: len(set(_CITATION.findall(text))) >= min_count, weight)


def no_refusal(weight: float = 1.0) -> Rule:
    """No stock phrase of refusal (English)."""
    plain = str.maketrans({"’": "'"})
    return Rule("no refusal", lambda text: not _REFUSALS.search(text.translate(plain)), weight)


def judged(weight: float = 1.0, *, statement: str) -> JudgedRule:
    """Judges hold `statement` for true of the answer, such as "The answer names its sources."."""
    return JudgedRule(f"judged: {statement}", statement, weight)


_KINDS: dict[str, Callable[..., Rule | JudgedRule]] = {
    "length": length,
    "pattern": pattern,
    "contains": contains,
    "forbids": forbids,
    "cites": cites,
    "no_refusal": no_refusal,
    "judged": judged,
}


class RulesReward:
    """The weighted sum as a TRL reward.

    Args:
        rules: checks and judged rules.
        judges: for the judged rules; three or more are weighted by agreement.

    Attributes:
        single_judged: for each row of the last call, whether fewer than two judges answered; empty
            without judged rules.

    Raises:
        ValueError: no rules, two of one name, judged rules without judges, or the reverse.
    """

    __name__ = "rules_reward"

    def __init__(self, rules: Sequence[Rule | JudgedRule], judges: Sequence[Judge] = ()) -> None:
        if not rules:
            raise ValueError("no rules; give at least one")
        names = [rule.name for rule in rules]
        if len(set(names)) < len(names):
            raise ValueError(f"the rules are {names}; give each its own name")
        self.rules, self.judges = list(rules), list(judges)
        self._judged = [rule for rule in rules if isinstance(rule, JudgedRule)]
        if self._judged and not judges:
            raise ValueError(f"rule {self._judged[0].name} needs a judge; give judges=[...]")
        if judges and not self._judged:
            raise ValueError("judges are given, but no rule is judged; leave them out")
        self.single_judged: list[bool] = []

    @classmethod
    def from_yaml(cls, path: str | Path, judges: Sequence[Judge] = ()) -> RulesReward:
        """Loads a list of `{kind, weight, name, …}`.

        Raises:
            ValueError: naming the entry at fault.
        """
        return cls(read_rules(path), judges)

    def __call__(
        self, prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        values = self.values(prompts, completions)
        log_metric = columns.get("log_metric")
        if log_metric is not None:  # TRL's way to a curve of each rule
            for rule, kept in zip(self.rules, values, strict=True):
                known = [value for value in kept if value is not None]
                if known:
                    log_metric(f"rule/{rule.name}", sum(known) / len(known))
        return [self._sum(row) for row in zip(*values, strict=True)]

    def values(
        self, prompts: Sequence[Any], completions: Sequence[Completion]
    ) -> list[list[float | None]]:
        """`[rules][rows]`: how far each rule holds, in [0, 1]; None where no judge answered."""
        texts = [completion_text(completion) for completion in completions]
        judged = iter(self._judge(prompts, texts))
        return [
            next(judged) if isinstance(rule, JudgedRule) else [float(rule.holds(t)) for t in texts]
            for rule in self.rules
        ]

    def report(self, completions: list[Completion], prompts: list[Any] | None = None) -> str:
        """One line a rule: weight, how far completions keep it, mean contribution.

        Raises:
            ValueError: no completions, or judged rules and no prompts.
        """
        if not completions:
            raise ValueError("no completions to report on")
        if prompts is None and self._judged:
            raise ValueError("judged rules need the prompts too; give prompts=[...]")
        values = self.values(prompts or [""] * len(completions), completions)
        lines = [f"{'weight':>8} {'kept':>6} {'mean':>8}  rule"]
        for rule, row in zip(self.rules, values, strict=True):
            known = [value for value in row if value is not None]
            kept = sum(known) / len(known) if known else math.nan
            line = f"{rule.weight:>8.2f} {kept:>6.0%} {rule.weight * kept:>8.3f}  {rule.name}"
            unknown = len(row) - len(known)
            lines.append(line + (f" ({unknown} without a verdict)" if unknown else ""))
        return "\n".join(lines)

    def _sum(self, values: Sequence[float | None]) -> float | None:
        if None in values:
            return None
        return sum(r.weight * v for r, v in zip(self.rules, values, strict=True) if v is not None)

    def _judge(self, prompts: Sequence[Any], texts: list[str]) -> list[list[float | None]]:
        """`[judged rules][rows]`."""
        if not self._judged:
            return []
        statements = [rule.statement for rule in self._judged]
        asked = list(map(prompt_text, prompts))
        found = [judge.holds(statements, asked, texts) for judge in self.judges]
        votes = [sum(verdict is not None for verdict in row) for row in zip(*found, strict=True)]
        self.single_judged = [count < 2 for count in votes]
        return [
            combine_by_agreement(
                [[None if verdict is None else float(verdict[k]) for verdict in j] for j in found]
            )
            for k in range(len(statements))
        ]


def read_rules(path: str | Path) -> list[Rule | JudgedRule]:
    """The rules of a file.

    Raises:
        ValueError: naming the entry at fault.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of rules, got {type(entries).__name__}")
    rules = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
            raise ValueError(f"{path}, rule {number}: kind must be one of {sorted(_KINDS)}")
        options = {key: value for key, value in entry.items() if key not in ("kind", "name")}
        try:
            rule = _KINDS[entry["kind"]](**options)
            rules.append(replace(rule, name=entry["name"]) if "name" in entry else rule)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, rule {number} ({entry['kind']}): {error}") from error
    return rules
