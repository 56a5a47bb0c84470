"""What a report says of texts: habits and their rewrites, languages, near-duplicates, turns."""

from __future__ import annotations

import random

import pytest

from fastpost.data.languages import main_language, require_languages
from fastpost.data.near_duplicates import NearDuplicates, jaccard, shingles
from fastpost.data.normalisers import NORMALISERS, habits_of, normalise_row, opening
from fastpost.data.turns import turns


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Sure! The answer is 4.", "The answer is 4."),
        ("Sure, I'd be happy to help! Paris.", "Paris."),
        ("Certainly, here is the list:\n\n- a", "- a"),
        ("Of course! Here's a poem:\nRoses", "Roses"),
        ("Sure! I'd be happy to help. **4**", "**4**"),
        ("Great question! It depends.", "It depends."),
        ("I'd be happy to help with that. First, ...", "First, ..."),
        ("Absolutely. Let me explain: it works.", "it works."),
    ],
)
def test_openings_are_removed(text: str, rest: str) -> None:
    assert opening(text) and NORMALISERS["opening"](text) == rest


@pytest.mark.parametrize(
    "text",
    [
        "Sure enough, it rained.",
        "Certainly not.",
        "The answer is sure.",
        "Great Britain is an island. It",
        "Of course the sum is 3.14. So",
        "Surely! No",
        "",
    ],
)
def test_content_is_no_opening(text: str) -> None:
    assert not opening(text) and NORMALISERS["opening"](text) == text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bold", "**Note**: 2**3**4 and `**x**`", "Note: 2**3**4 and `**x**`"),
        ("bold", "```py\n**k**\n``` **a b**", "```py\n**k**\n``` a b"),
        ("bold", "```\n**open fence**", "```\n**open fence**"),
        ("headings", "# One\ntext #2\n### Two ##\n#tag", "One\ntext #2\nTwo\n#tag"),
        ("headings", "```sh\n# comment\n```", "```sh\n# comment\n```"),
        ("bullets", "* a\n  + b\n2 * 3\n• c", "- a\n  - b\n2 * 3\n- c"),
    ],
)
def test_markdown_rewrites(name: str, text: str, expected: str) -> None:
    assert NORMALISERS[name](text) == expected
    assert NORMALISERS[name](expected) == expected


def test_habits() -> None:
    text = "Sure! See:\n# T\n* **a**\n1. b\n\n| a |\n|---|\n```\nx\n```"
    assert habits_of(text) == [
        "opening", "bold", "headings", "bullets", "numbered lists", "tables", "code blocks",
    ]  # fmt: skip
    assert habits_of("Plain text, 3 * 4 = 12.") == []


def test_only_the_assistants_texts_are_rewritten() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Sure! **x**"},
            {"role": "assistant", "content": [{"type": "text", "text": "Sure! **x**"}]},
            {"role": "assistant", "content": "Sure! "},
        ],
        "n": 1,
    }
    before = str(row)
    found = normalise_row(row, ["opening", "bold"])
    assert [turn.text for turn in turns(found)] == ["Sure! **x**", "x", "Sure! "]
    assert str(row) == before and found["n"] == 1


def test_turns_of_every_form() -> None:
    def found(row: dict[str, object]) -> list[tuple[str, str]]:
        return [(turn.role, turn.text) for turn in turns(row)]

    assert found({"prompt": "p", "chosen": "c", "rejected": "r"}) == [
        ("user", "p"),
        ("assistant", "c"),
    ]
    shared = [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]
    assert found({"conversations": shared}) == [("user", "p"), ("assistant", "c")]
    assert found({"text": "t", "messages": None}) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat and looked at me.", "en"),
        ("Le chat est assis sur le tapis et me regarde.", "fr"),
        ("Die Katze sitzt auf der Matte und schaut mich an.", "de"),
        ("Сегодня хорошая погода, и мы пойдём гулять в парк.", "ru"),
        ("猫は敷物の上に座って私を見ている。", "ja"),
        ("고양이가 매트 위에 앉아 나를 보고 있다.", "ko"),
        ("1 + 2 = 3!", "und"),
        ("x = f(y) + 1", "und"),
        ("ok", "und"),
        ("", "und"),
        ("\ud800", "und"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert main_language(text) == language


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"languages has Latin; known are .*en, eo"):
        require_languages(("en", "Latin"))
    with pytest.raises(ValueError, match=r'give a tuple of codes, such as \("en",\)'):
        require_languages("en")


def test_near_duplicates_are_those_of_an_exact_comparison() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(500)]
    texts: list[str] = []
    for _ in range(60):
        words = rng.choices(vocabulary, k=rng.randrange(40, 200))
        texts.append(" ".join(words))
        for edits in (0, 1, 4, 30):
            edited = list(words)
            for _ in range(edits):
                edited[rng.randrange(len(edited))] = rng.choice(vocabulary)
            texts.append(" ".join(edited))
    sets = [shingles(text) for text in texts]
    exact = {
        i for i in range(len(texts)) if any(jaccard(sets[i], sets[j]) >= 0.8 for j in range(i))
    }
    near = NearDuplicates(0.8)
    for i, text in enumerate(texts):
        near.add(i, text)
    found = near.pairs(texts.__getitem__)
    assert len(exact) > 90
    assert {pair.row for pair in found} <= exact
    assert len(exact - {pair.row for pair in found}) <= 1
    for pair in found:
        assert pair.similarity == jaccard(sets[pair.row], sets[pair.earlier]) >= 0.8


def test_near_duplicates_of_short_and_empty_texts() -> None:
    texts = ["", "yes", "Yes!", "no", ""]
    near = NearDuplicates()
    for i, text in enumerate(texts):
        near.add(i, text)
    assert [(p.row, p.earlier) for p in near.pairs(texts.__getitem__)] == [(2, 1)]
