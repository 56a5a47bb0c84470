"""Each rule on both sides of its line, the weighted sum, the report and the YAML form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpost.rewards import rules
from fastpost.rewards.rules import Rule, RulesReward
from tests.judges.fake_judges import FakeModel, Judge


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
        ("- {kind: judged}", r"rule 1 \(judged\).*statement"),
        ("- {kind: judged, statement: ''}", "give a sentence"),
        ("- {kind: judged, statement: It rhymes.}", "needs a judge"),
        ("- {kind: cites}\n- {kind: cites}", "its own name"),
        ("- {kind: cites, weight: much}", "weight is 'much'"),
        ("- {kind: [", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        RulesReward.from_yaml(file)


def reader(name: str, says: tuple[bool, bool] | None) -> Judge:
    """Holds two statements for true or not; None babbles about a hard answer."""

    def speak(texts: dict[str, str], seed: int) -> str:
        if says is None and texts["answer"] == "hard":
            return "Well..."
        first, second = says or (True, True)
        return json.dumps({"1": first, "2": second})

    return Judge(FakeModel(speak, name), attempts=1)


def test_judged_rules_are_the_share_of_judges_that_agree(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "- {kind: judged, weight: 2, statement: It rhymes., name: rhyme}\n"
        "- {kind: contains, weight: 1, phrases: [moon]}\n"
        "- {kind: judged, weight: -0.5, statement: It lectures.}\n"
    )
    judges = [reader("a", (True, False)), reader("b", (True, False)), reader("c", (True, True))]
    reward = RulesReward.from_yaml(file, judges)
    # The third judge stands alone on the second statement: 1 / 1.05 against twice 1 / 0.05.
    alone = (1 / 1.05) / (1 / 1.05 + 2 / 0.05)
    logged = {}
    scores = reward(["p"] * 2, ["a moon", "none"], log_metric=logged.__setitem__)
    assert scores == pytest.approx([3 - 0.5 * alone, 2 - 0.5 * alone])
    assert logged["rule/rhyme"] == 1 and logged["rule/contains moon"] == 0.5
    assert all(len(judge.model.messages) == 2 for judge in judges)  # both statements at once
    assert reward.single_judged == [False, False]
    report = reward.report(["a moon", "none"], ["p"] * 2)
    assert "rhyme" in report and "100%" in report and "50%" in report
    with pytest.raises(ValueError, match="need the prompts"):
        reward.report(["a"])


def test_a_row_that_no_judge_answers_has_no_reward() -> None:
    statements = [rules.judged(statement=text) for text in ("It rhymes.", "It is short.")]
    reward = RulesReward(statements, [reader("a", None)])
    assert reward(["p"] * 2, ["easy", "hard"]) == [2.0, None]
    assert reward.single_judged == [True, True]
    assert "1 without a verdict" in reward.report(["easy", "hard"], ["p"] * 2)
    with pytest.raises(ValueError, match="no rule is judged"):
        RulesReward([rules.cites()], [reader("a", None)])
