"""Conversations as tokenised rows with assistant masks, where the chat template marks nothing.

`trl.SFTTrainer(assistant_only_loss=True)` asks the template for the mask, patches the templates it
knows and refuses all others. It does accept rows that bring their own `assistant_masks`: so the
rows are made here (see `assistant_mask`), and TRL builds labels, cuts, packs and collates as usual.
"""

from __future__ import annotations

import json
from typing import Any

from fastpost.guards.assistant_mask import Message, render_with_mask
from fastpost.guards.columns import column_names, require_columns

# An assistant turn in the middle, as training sees it; asked where its mask ends.
_PROBE = [
    {"role": "user", "content": "probe"},
    {"role": "assistant", "content": "probe"},
    {"role": "user", "content": "probe"},
]


def mask_assistant_turns(
    dataset: Any, tokenizer: Any, *, completion_only: bool = True, num_proc: int | None = None
) -> Any:
    """Tokenise a conversational data set, the assistant's tokens marked by incremental rendering.

    Args:
        dataset: rows with `messages` (or `conversations`), or with `prompt` and `completion` as
            lists of messages; a row's own `tools` (list or JSON text) and `chat_template_kwargs`
            are honoured. Rows with `input_ids` are left as they are.
        tokenizer: a fast tokenizer with a chat template.
        completion_only: assistant turns of `prompt` are context, not scored.
        num_proc: processes for `Dataset.map`; streams take none.

    Returns:
        The data set with the columns `input_ids` and `assistant_masks` alone.

    Raises:
        ValueError: other columns, or a template that cannot be masked (see `render_with_mask`).
    """
    columns = column_names(dataset)
    if "input_ids" in columns:
        return dataset
    choices = [["messages"], ["conversations"], ["prompt", "completion"]]
    require_columns(columns, choices, "assistant_only_loss")
    options: dict[str, Any] = {"remove_columns": columns}
    if hasattr(dataset, "__len__"):
        options |= {"num_proc": num_proc, "desc": "Masking all but assistant turns"}
    return dataset.map(
        _tokenize_row,
        fn_kwargs={"tokenizer": tokenizer, "completion_only": completion_only},
        **options,
    )


def _tokenize_row(
    row: dict[str, Any], tokenizer: Any, completion_only: bool
) -> dict[str, list[int]]:
    tools = row.get("tools")
    if "prompt" in row:
        messages = row["prompt"] + row["completion"]
        scored_from = len(row["prompt"]) if completion_only else 0
    else:
        messages, scored_from = row.get("messages") or row["conversations"], 0
    input_ids, mask = render_with_mask(
        tokenizer,
        [_with_role_and_content(message) for message in messages],
        json.loads(tools) if isinstance(tools, str) else tools,
        scored_from=scored_from,
        **(row.get("chat_template_kwargs") or {}),
    )
    return {"input_ids": input_ids, "assistant_masks": mask}


def _with_role_and_content(message: Message) -> Message:
    """The message, its keys renamed where they are ShareGPT's `from` and `value`."""
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): value for key, value in message.items()}


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the token with which the template ends an assistant turn, None where it has none.

    Raises:
        ValueError: the template cannot be masked (see `render_with_mask`).
    """
    input_ids, mask = render_with_mask(tokenizer, _PROBE)
    scored = [token for token, is_scored in zip(input_ids, mask, strict=True) if is_scored]
    return scored[-1] if scored and scored[-1] in tokenizer.added_tokens_decoder else None


__all__ = ["end_of_turn", "mask_assistant_turns"]
