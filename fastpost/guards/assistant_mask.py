"""Which tokens of a conversation the assistant wrote, for templates that do not mark them.

A chat template with `{% generation %}` markers says itself what the assistant writes; most do not
have them. But at inference the same template renders the prompt of every turn, so the turn's place
follows from rendering prefixes of the conversation:

    start of turn i = len(render(messages[:i], add_generation_prompt=True))
    end of turn i   = len(render(messages[:i + 1]))

as long as both texts really are the beginning of the whole text. That is checked, never assumed:
a template that drops earlier thinking, or moves the system text to the last user turn, renders a
turn differently once another follows, and is refused with the place where the texts part.

The whole text is tokenised once, exactly as `apply_chat_template` does it (the template writes BOS,
the tokenizer adds none). A token is scored if it lies wholly within a turn. The end-of-turn token
belongs to the turn; white space that the template writes after it does not, since at inference the
model has stopped by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from warnings import warn

from fastpost.scoring import FastpostWarning

# Characters of each text that an error shows around the place where two renders part.
_SHOWN = 30

Message = dict[str, Any]


def render_with_mask(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    *,
    scored_from: int = 0,
    **template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 where the assistant wrote the token.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed) with a chat template.
        messages: the conversation; turns of role "assistant" are scored.
        tools: as for `apply_chat_template`.
        scored_from: assistant turns before this message are context only: not scored, and free to
            be rendered differently than they once were.
        **template_kwargs: for `apply_chat_template` (`chat_template`, `enable_thinking`, ...).

    Returns:
        `(input_ids, assistant_mask)`, two lists of equal length; the ids are those of
        `apply_chat_template(messages, tokenize=True)`.

    Raises:
        ValueError: the tokenizer has no offsets, a turn to be scored comes first, or the template
            renders a turn differently once later messages follow.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; assistant masks need a fast "
            "tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )

    def render(count: int, with_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            list(messages[:count]),
            tools=tools,
            tokenize=False,
            add_generation_prompt=with_prompt,
            **template_kwargs,
        )

    text = render(len(messages))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    extents = _extents(encoded["offset_mapping"])
    mask = [0] * len(extents)
    for turn in range(scored_from, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        start, end = _turn_span(render, text, turn, len(messages), tokenizer.eos_token)
        tokens = _tokens_of_span(extents, start, end)
        tokens = _without_trailing_space(tokens, encoded["input_ids"], extents, text, tokenizer)
        if not tokens and messages[turn].get("content"):
            raise ValueError(
                f"the chat template renders nothing of message {turn}, an assistant turn with "
                f"content {str(messages[turn]['content'])[:_SHOWN]!r}; use a template that does"
            )
        for token in tokens:
            mask[token] = 1
    return encoded["input_ids"], mask


def _turn_span(
    render: Callable[..., str], text: str, turn: int, num_messages: int, eos: str | None
) -> tuple[int, int]:
    """Characters [start, end) of an assistant turn within the whole text.

    Raises:
        ValueError: the prompt before the turn, or the turn, is not the beginning of the whole text.
    """
    if turn == 0:
        raise ValueError(
            "message 0 is an assistant turn, and no inference prompt precedes it; begin the "
            "conversation with a user or system message, or score later turns only"
        )
    prompt = render(turn, with_prompt=True)
    if not text.startswith(prompt):
        raise ValueError(_unstable(f"the prompt before message {turn}", prompt, text))
    if turn == num_messages - 1:
        return len(prompt), len(text)
    upto = render(turn + 1)
    if not text.startswith(upto):
        # Some templates (Phi-3) close the whole conversation, not the turn, with EOS.
        shorter = upto.removesuffix(eos) if eos else upto
        if not text.startswith(shorter):
            raise ValueError(_unstable(f"message {turn}", upto, text))
        upto = shorter
    return len(prompt), max(len(prompt), len(upto))


def _unstable(what: str, alone: str, text: str) -> str:
    pairs = enumerate(zip(alone, text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(alone), len(text)))
    begin = max(0, at - _SHOWN)
    return (
        f"the chat template renders {what} differently once later messages follow: at character "
        f"{at}, {alone[begin : at + _SHOWN]!r} became {text[begin : at + _SHOWN]!r}. Templates do "
        "so that drop earlier thinking or move the system text, and a mask would mark the wrong "
        "tokens. Give one row per assistant turn as prompt + completion (turns of the prompt are "
        "context only), or use a template with {% generation %} markers"
    )


def _extents(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Characters that each token covers.

    Some tokenizers trim the leading space off a token's offsets, so a token begins where the one
    before it ended; tokens that share a character (bytes of one) all begin where it does.
    """
    extents, last = [], 0
    for start, end in offsets:
        extents.append((min(start, last), end))
        last = max(last, end)
    return extents


def _tokens_of_span(extents: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Tokens wholly within [start, end); warns where a token lies across one of the two."""
    if any(a < edge < b for a, b in extents for edge in (start, end)):
        # One wording for all rows, so that it is shown once.
        warn(
            "fastpost: a token lies across the edge of an assistant turn, so the prompt of some "
            "rows is tokenised differently than at inference; such tokens are not scored. Strip "
            "white space at the beginning of assistant contents, or end the template's turns "
            "with a special token",
            FastpostWarning,
            stacklevel=3,
        )
    return [i for i, (a, b) in enumerate(extents) if start <= a and b <= end and b > start]


def _without_trailing_space(
    tokens: list[int],
    ids: Sequence[int],
    extents: list[tuple[int, int]],
    text: str,
    tokenizer: Any,
) -> list[int]:
    """The turn's tokens up to its end-of-turn token, if white space is all that follows it."""
    kept = len(tokens)
    while kept and text[slice(*extents[tokens[kept - 1]])].isspace():
        kept -= 1
    ends_turn = kept and ids[tokens[kept - 1]] in tokenizer.added_tokens_decoder
    return tokens[:kept] if ends_turn else tokens


__all__ = ["Message", "render_with_mask"]
