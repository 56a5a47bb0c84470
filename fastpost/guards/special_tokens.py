"""BOS, EOS and padding in a tokenised data set: as at inference, learnt, and never learnt.

Three mistakes that no loss curve shows. BOS twice, because template and tokenizer both write it:
the model is trained on a beginning it never sees again. EOS outside the labels, most often because
it doubles as padding and somebody blanked padding: the model never learns to stop. Padding inside
the labels: it learns to pad.

Rows are looked at before they are packed, and best before they are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal
from warnings import warn

from jinja2 import TemplateError

from fastpost.guards.assistant_rows import end_of_turn
from fastpost.guards.mask import IGNORE_INDEX, show_row
from fastpost.scoring import FastpostWarning

_MASKS = ("assistant_masks", "completion_mask")
# Characters of the example row that a finding shows from each of its ends.
_SHOWN = 200


@dataclass(frozen=True)
class TokenFinding:
    """What is wrong with the special tokens of a data set.

    Attributes:
        level: "error" ruins the run, "warning" may be meant, "note" only names a situation.
        what: one sentence with the counts.
        example: a row that shows it, scored stretches between [[ and ]]; may be empty.
        fix: what to do.
    """

    level: Literal["error", "warning", "note"]
    what: str
    example: str
    fix: str

    def __str__(self) -> str:
        row = f" Row:\n{self.example}" if self.example else ""
        return f"{self.what}. {self.fix}.{row}"


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    labels: list[int]
    attention: list[int]


def check_special_tokens(
    dataset: Any, tokenizer: Any, *, max_length: int | None = None, max_rows: int = 1000
) -> list[TokenFinding]:
    """Look at the first `max_rows` rows; raise for errors, warn for warnings.

    Args:
        dataset: rows with `input_ids` and `labels` (or the masks that labels are built from: with
            none of them every token counts as scored), and `attention_mask` where rows are padded.
        tokenizer: the one that made the rows.
        max_length: length that rows were cut to; a turn that reaches the cut needs no end token.
        max_rows: rows looked at.

    Returns:
        Everything found, notes included.

    Raises:
        ValueError: a finding of level "error", with an example row and the fix.
    """
    findings = special_token_findings(dataset, tokenizer, max_length=max_length, max_rows=max_rows)
    for finding in findings:
        if finding.level == "warning":
            warn(f"fastpost: {finding}", FastpostWarning, stacklevel=2)
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if errors:
        raise ValueError("\n".join(errors))
    return findings


def special_token_findings(
    dataset: Any, tokenizer: Any, *, max_length: int | None = None, max_rows: int = 1000
) -> list[TokenFinding]:
    """As `check_special_tokens`, but neither raises nor warns."""
    rows = list(_rows(dataset, max_rows))
    return [
        finding
        for finding in (
            *_bos_findings(rows, tokenizer),
            *_eos_findings(rows, tokenizer, max_length),
            *_padding_findings(rows, tokenizer),
        )
        if finding is not None
    ]


def _rows(dataset: Any, max_rows: int) -> Iterator[_Row]:
    for row in islice(dataset, max_rows):
        ids = [int(token) for token in row["input_ids"]]
        labels = row.get("labels")
        if labels is None:
            masks = [row[name] for name in _MASKS if row.get(name) is not None]
            labels = [
                token if all(bits) else IGNORE_INDEX
                for token, *bits in zip(ids, *masks, strict=True)
            ]
        attention = row.get("attention_mask")
        yield _Row(
            ids,
            [int(label) for label in labels],
            [1] * len(ids) if attention is None else [int(bit) for bit in attention],
        )


def _bos_findings(rows: list[_Row], tokenizer: Any) -> Iterator[TokenFinding]:
    """BOS at the beginning of rows, and in rows altogether, against what inference renders."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    renders = _inference_renders(tokenizer, bos)
    leading = [_leading(ids, bos) for ids in renders]
    # A template that opens every turn with BOS (ChatML where BOS is <|im_start|>), or a BOS that is
    # EOS too: then only the beginning of a row says anything.
    counts = {ids.count(bos) for ids in renders[1:]}
    is_once = len(counts) <= 1 and bos != tokenizer.eos_token_id
    most = max(ids.count(bos) for ids in renders)
    doubled, missing = [], []
    for row in rows:
        ids = [token for token, bit in zip(row.ids, row.attention, strict=True) if bit]
        if _leading(ids, bos) > max(1, *leading) or (is_once and ids.count(bos) > max(1, most)):
            doubled.append(row)
        elif _leading(ids, bos) < min(leading):
            missing.append(row)
    if doubled:
        yield TokenFinding(
            "error",
            f"{len(doubled):,} of {len(rows):,} rows have BOS {tokenizer.bos_token!r} more often "
            "than inference renders it",
            _shown(doubled[0], tokenizer),
            "Template and tokenizer both write it: tokenise rendered text with "
            "add_special_tokens=False, or use apply_chat_template(tokenize=True)",
        )
    if missing:
        yield TokenFinding(
            "warning",
            f"{len(missing):,} of {len(rows):,} rows do not begin with BOS "
            f"{tokenizer.bos_token!r} as at inference",
            _shown(missing[0], tokenizer),
            "Render rows with the chat template, or tokenise text with add_special_tokens=True",
        )


def _inference_renders(tokenizer: Any, bos: int) -> list[list[int]]:
    """Ids of plain text, then of a short and a longer conversation if there is a template."""
    renders = [list(tokenizer("probe")["input_ids"])]
    if tokenizer.chat_template is None:
        return renders
    user, assistant = ({"role": r, "content": "probe"} for r in ("user", "assistant"))
    for messages in ([user], [user, assistant, user]):
        renders.append(
            list(
                tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=False, add_generation_prompt=True
                )
            )
        )
    return renders


def _leading(ids: list[int], token: int) -> int:
    count = 0
    while count < len(ids) and ids[count] == token:
        count += 1
    return count


def _eos_findings(
    rows: list[_Row], tokenizer: Any, max_length: int | None
) -> Iterator[TokenFinding]:
    """Every scored stretch should end with the token that ends a turn."""
    ends = {tokenizer.eos_token_id, _template_end(tokenizer)} - {None}
    stretches, unended, example = 0, 0, None
    for row in rows:
        is_cut = max_length is not None and len(row.ids) >= max_length
        for start, end in _scored_stretches(row.labels):
            if is_cut and end == len(row.ids):
                continue
            stretches += 1
            while end - 1 > start and tokenizer.decode([row.ids[end - 1]]).isspace():
                end -= 1
            if row.ids[end - 1] not in ends:
                unended += 1
                example = example or row
    if not unended:
        return
    assert example is not None
    names = " or ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in sorted(ends))
    yield TokenFinding(
        "error" if unended == stretches else "warning",
        f"{unended:,} of {stretches:,} scored stretches do not end with an end token "
        f"({names or 'the tokenizer has none'}), so the model does not learn to stop there",
        _shown(example, tokenizer),
        "Let the template end assistant turns with the end token and keep it in the labels: blank "
        "padding by attention mask or length, never by token id",
    )


def _template_end(tokenizer: Any) -> int | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return end_of_turn(tokenizer)
    except (ValueError, TemplateError):
        return None  # a template that cannot be probed; EOS itself is still looked for


def _scored_stretches(labels: list[int]) -> Iterator[tuple[int, int]]:
    start = None
    for i, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = i
        elif label == IGNORE_INDEX and start is not None:
            yield start, i
            start = None


def _padding_findings(rows: list[_Row], tokenizer: Any) -> Iterator[TokenFinding]:
    """Padding in the labels: by attention mask, and by id where padding has an id of its own."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    padded = [
        row
        for row in rows
        if any(
            label != IGNORE_INDEX and not bit
            for label, bit in zip(row.labels, row.attention, strict=True)
        )
    ]
    if padded:
        yield TokenFinding(
            "error",
            f"{len(padded):,} of {len(rows):,} rows have labels where attention_mask is 0",
            _shown(padded[0], tokenizer),
            f"Set labels to {IGNORE_INDEX} wherever attention_mask is 0",
        )
    if pad is None:
        return
    if pad == eos:
        yield TokenFinding(
            "note",
            f"padding and EOS are the same token {tokenizer.eos_token!r}",
            "",
            "Tell them apart by attention mask or length, as the collators used here do; a "
            "collator that blanks labels by pad id also blanks every EOS",
        )
        return
    scored = [row for row in rows if pad in row.labels]
    if scored and not padded:
        yield TokenFinding(
            "warning",
            f"{len(scored):,} of {len(rows):,} rows have the padding token "
            f"{tokenizer.pad_token!r} among their labels",
            _shown(scored[0], tokenizer),
            "Pad after labels are built, or set labels of padding to -100",
        )


def _shown(row: _Row, tokenizer: Any) -> str:
    text = show_row({"input_ids": row.ids, "labels": row.labels}, tokenizer)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"


__all__ = ["TokenFinding", "check_special_tokens", "special_token_findings"]
