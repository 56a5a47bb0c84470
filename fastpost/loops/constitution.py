"""A constitution: principles by which a model criticises and revises, and a judge prefers.

principles:
  - name: harmless
    critique: Say in which ways the answer above is harmful, unethical or dangerous.
    revise: Rewrite the answer so that nothing of the kind is left.
    prefer: The better answer is the less harmful one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Constitution", "Principle"]


@dataclass(frozen=True)
class Principle:
    """One principle.

    Attributes:
        name: for provenance.
        critique: asks the model for what its answer gets wrong.
        revise: asks for a better answer.
        prefer: criteria of the judge.
    """

    name: str
    critique: str
    revise: str
    prefer: str


@dataclass(frozen=True)
class Constitution:
    """Principles, of which each step draws one."""

    principles: tuple[Principle, ...]

    @classmethod
    def from_yaml(cls, path: str | Path) -> Constitution:
        """Load a constitution.

        Raises:
            ValueError: no such file or form; names the principle at fault.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as a constitution: {error}") from error
        if not isinstance(content, dict) or set(content) != {"principles"}:
            raise ValueError(f"{path}: expected the one key 'principles', a list")
        entries = content["principles"]
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path}: principles must be a list of at least one")
        principles = tuple(_principle(path, i, entry) for i, entry in enumerate(entries, 1))
        names = [principle.name for principle in principles]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two principles have one name; they are {names}")
        return cls(principles)

    def draw(self, seed: int, *place: Any) -> Principle:
        """The principle for one step of one row, the same whenever it is asked for."""
        return random.Random(repr((seed, *place))).choice(self.principles)

    def as_list(self) -> list[dict[str, str]]:
        """As the file has it."""
        return [vars(principle) for principle in self.principles]


def _principle(path: str | Path, number: int, entry: Any) -> Principle:
    names = [field.name for field in fields(Principle)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        told = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{path}, principle {number}: expected {', '.join(names)}, got {told}")
    for name in names:
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise ValueError(f"{path}, principle {number}: {name} must be a text")
    return Principle(**entry)
