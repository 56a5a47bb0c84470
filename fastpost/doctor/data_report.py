"""The data doctor: what would silently ruin a run on this file with this tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fastpost.doctor.conversation_checks import conversation_findings
from fastpost.doctor.data_finding import DataFinding, united
from fastpost.doctor.data_sample import COLUMN_SETS, sample_of
from fastpost.doctor.render_checks import Rendered, render
from fastpost.guards.columns import require_columns
from fastpost.guards.mask import IGNORE_INDEX
from fastpost.guards.special_tokens import special_token_findings

__all__ = ["DataReport", "check_data"]


@dataclass(frozen=True)
class DataReport:
    """Findings and counts over the rows looked at.

    Attributes:
        rows: rows looked at.
        tokens, scored: of all rendered answers, cut to max_length.
        truncated: rendered answers longer than max_length.
        findings: errors first.
    """

    rows: int
    tokens: int
    scored: int
    truncated: int
    findings: list[DataFinding]


def check_data(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_rows: int = 1000,
) -> DataReport:
    """Looks at the first `max_rows` rows.

    Args:
        rows: SFT (`messages`, `prompt` + `completion`, `text`), preference (`chosen`, `rejected`)
            or prompt-only rows; `tools` and `chat_template_kwargs` of a row are honoured.
        tokenizer: the one the model will be trained with; a fast one.
        max_length: length that rows will be cut to, in tokens.

    Raises:
        ValueError: the first row has none of the columns that training reads.
    """
    findings: list[DataFinding] = []
    rendered: list[Rendered] = []
    markers = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    count = 0
    for number, row in enumerate(islice(rows, max_rows)):
        if number == 0:
            require_columns(row, COLUMN_SETS, "training")
        count += 1
        try:
            options = _template_options(row)
        except ValueError as error:
            fix = "write tools as a list of schemas, or as its JSON"
            what = "the row's tools are not JSON"
            findings.append(DataFinding("columns", "error", number, what, str(error), fix))
            continue
        sample = sample_of(number, row, options)
        if isinstance(sample, str):
            fix = "drop the row, or give it the columns of the others"
            shown = str(row)[:120]
            findings.append(DataFinding("columns", "error", number, sample, shown, fix))
            continue
        findings += conversation_findings(sample, markers)
        made, problems = render(sample, tokenizer, max_length)
        rendered += made
        findings += problems
    findings += _token_findings(rendered, tokenizer, max_length)
    cut = [r.labels[:max_length] for r in rendered]
    return DataReport(
        count,
        sum(map(len, cut)),
        sum(label != IGNORE_INDEX for labels in cut for label in labels),
        sum(max_length is not None and len(r.input_ids) > max_length for r in rendered),
        united(findings),
    )


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(row.get("chat_template_kwargs") or {})}


def _token_findings(
    rendered: Sequence[Rendered], tokenizer: Any, max_length: int | None
) -> list[DataFinding]:
    """The special-token guard's findings, each with the first row that has it."""
    inputs = [{"input_ids": r.input_ids, "labels": r.labels} for r in rendered if r.input_ids]
    numbers = [r.row for r in rendered if r.input_ids]

    def found(rows: list[dict[str, Any]]) -> Any:
        limit = max(1, len(rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the template: `render` has its own findings
            return special_token_findings(rows, tokenizer, max_length=max_length, max_rows=limit)

    findings = []
    for finding in found(inputs):
        row = None
        if finding.example:
            row = next(
                number
                for number, one in zip(numbers, inputs, strict=True)
                if any(other.fix == finding.fix for other in found([one]))
            )
        findings.append(
            DataFinding(
                "BOS/EOS/pad", finding.level, row, finding.what, finding.example, finding.fix
            )
        )
    return findings
