"""Explicit rules, each 0 or 1, summed by weight: R = Σ_k w_k · rule_k(completion).

Written in Python or in YAML, for example:

    - {kind: length, weight: 0.2, max_words: 200}
    - {kind: pattern, weight: 1.0, regex: '<answer>.*</answer>'}
    - {kind: forbids, weight: 0.5, phrases: [as an AI]}
    - {kind: cites, weight: 0.5, min_count: 1}
    - {kind: no_refusal, weight: 1.0}

Rule-based rewards with graded propositions: arXiv:2411.01111, eq. 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .completion import Completion, completion_text

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
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"rule {self.name}: weight is {self.weight}; give a number but 0")


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


_KINDS: dict[str, Callable[..., Rule]] = {
    "length": length,
    "pattern": pattern,
    "contains": contains,
    "forbids": forbids,
    "cites": cites,
    "no_refusal": no_refusal,
}


class RulesReward:
    """The weighted sum as a TRL reward."""

    __name__ = "rules_reward"

    def __init__(self, rules: Sequence[Rule]) -> None:
        if not rules:
            raise ValueError("no rules; give at least one")
        self.rules = list(rules)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RulesReward:
        """Loads a list of `{kind, weight, …}`; raises ValueError naming the entry at fault."""
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list of rules, got {type(entries).__name__}")
        rules = []
        for number, entry in enumerate(entries, 1):
            if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
                raise ValueError(f"{path}, rule {number}: kind must be one of {sorted(_KINDS)}")
            options = {key: value for key, value in entry.items() if key != "kind"}
            try:
                rules.append(_KINDS[entry["kind"]](**options))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, rule {number} ({entry['kind']}): {error}") from error
        return cls(rules)

    def __call__(
        self, prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        texts = map(completion_text, completions)
        return [sum(rule.weight for rule in self.rules if rule.holds(text)) for text in texts]

    def report(self, completions: list[Completion]) -> str:
        """One line a rule: weight, share of completions that keep it, mean contribution."""
        if not completions:
            raise ValueError("no completions to report on")
        texts = [completion_text(completion) for completion in completions]
        lines = [f"{'weight':>8} {'kept':>6} {'mean':>8}  rule"]
        for rule in self.rules:
            kept = sum(map(rule.holds, texts)) / len(texts)
            line = f"{rule.weight:>8.2f} {kept:>6.0%} {rule.weight * kept:>8.3f}  {rule.name}"
            lines.append(line)
        return "\n".join(lines)
