"""Rewards for the shape of an answer: reasoning in one pair of tags, the answer in another.

The form is that of DeepSeek-R1 (arXiv:2501.12948, table 1): `<think> … </think><answer> …
</answer>`. Tags are matched exactly and must each occur once, so repeating them earns nothing.
"""

from __future__ import annotations

from typing import Any

from .completion import Completion, Reward, completion_text


def tagged(text: str, tag: str) -> str | None:
    """What stands between `<tag>` and `</tag>`, None unless each occurs once and in this order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    _, _, after = text.partition(opening)
    inside, found, _ = after.partition(closing)
    return inside.strip() if found else None


def has_format(text: str, tags: tuple[str, ...]) -> bool:
    """Whether `text` is the tagged parts in order, none empty, and nothing else but space."""
    rest = text
    for tag in tags:
        inside = tagged(text, tag)
        opening, closing = f"<{tag}>", f"</{tag}>"
        rest = rest.lstrip()
        if not inside or not rest.startswith(opening):
            return False
        rest = rest.partition(closing)[2]
    return not rest.strip()


def tags_reward(tags: tuple[str, ...] = ("think", "answer")) -> Reward:
    """Builds a reward: 1.0 where the completion consists of the tagged parts, else 0.0."""
    if not tags or len(set(tags)) != len(tags):
        raise ValueError(f"tags is {tags}; give one or more different names")

    def reward(
        prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        return [float(has_format(completion_text(c), tags)) for c in completions]

    reward.__name__ = "_".join(tags) + "_format_reward"
    return reward
