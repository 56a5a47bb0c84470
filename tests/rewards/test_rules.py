"""Each rule on both sides of its line, the weighted sum, the report and the YAML form."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpost.rewards import rules
from fastpost.rewards.rules import Rule, RulesReward


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        (rules.length(min_words=2, max_words=3), "a b c", "a b c d"),
        (rules.length(min_words=2), "a b", "a"),
        (rules.pattern(regex="<a>.*</a>"), "<a>\n</a>", "<a>"),
        (rules.contains(phrases=["Yes", "no"]), "yes and NO", "yes"),
        (rules.forbids(phrases=["as an AI"]), "hello", "As an ai, I"),
        (rules.cites(min_count=2), "[1] [x](https://a.b)", "[1] and [1] again"),
        (rules.no_refusal(), "I can help.", "I’m sorry, but no."),
        (rules.no_refusal(), "Nobody is sorry.", "I cannot assist with that."),
    ],
)
def test_a_rule_holds_on_one_side_only(rule: Rule, kept: str, broken: str) -> None:
    assert rule.holds(kept) and not rule.holds(broken)


def test_the_reward_is_the_weighted_sum() -> None:
    reward = RulesReward([rules.contains(2.0, phrases=["a"]), rules.contains(-0.5, phrases=["b"])])
    message = [{"role": "assistant", "content": "b"}]
    assert reward([""] * 4, ["a", "a b", message, "c"]) == [2.0, 1.5, -0.5, 0]
    report = reward.report(["a", "a b"])
    assert "100%" in report and "50%" in report and "contains b" in report and "-0.250" in report


def test_yaml_rules_equal_the_python_ones(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "- {kind: length, weight: 0.25, max_words: 3}\n"
        "- {kind: pattern, regex: '^A'}\n"
        "- {kind: no_refusal, weight: 2}\n"
    )
    reward = RulesReward.from_yaml(file)
    assert reward(["", ""], ["A b", "I am sorry but A no"]) == [3.25, 0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- {kind: lenght}", "rule 1: kind must be one of"),
        ("- {kind: cites}\n- {kind: length, max_word: 3}", r"rule 2 \(length\).*max_word"),
        ("- {kind: pattern, regex: '('}", "not valid"),
        ("- {kind: forbids, phrases: word}", "give a list of strings"),
        ("kind: cites", "expected a list"),
        ("- {kind: cites, weight: 0}", "weight is 0"),
        ("[]", "no rules"),
    ],
)
def test_bad_yaml_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        RulesReward.from_yaml(file)
