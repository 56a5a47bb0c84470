"""SmolLM2 asks itself questions and answers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.interface import Sampling
from fastpost.chat_model.local import LocalChatModel, user_header
from fastpost.chat_model.model_spec import weights_name
from fastpost.data.row_files import row_file
from fastpost.data.rows import read_rows
from fastpost.demo.smollm2 import smollm2_path
from fastpost.synthesis.filters import Filters
from fastpost.synthesis.magpie import magpie
from fastpost.synthesis.provenance import has_its_hash


@pytest.mark.slow
def test_rows_of_a_real_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert user_header(tokenizer, []).endswith("<|im_end|>\n<|im_start|>user\n")
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=72)
    chat = LocalChatModel(model, tokenizer, weights_name(path), sampling=sampling)
    settings: dict[str, Any] = {"system": "Answer in one sentence.", "filters": Filters()}
    first = CachedChatModel(chat, tmp_path / "replies")
    rows, report = magpie(first, 6, seed=3, **settings)
    print(report, *rows, sep="\n")
    assert rows and report.kept + sum(report.dropped.values()) == 6 and report.missing == 0
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert has_its_hash(row)
        assert not any("<|im_" in message["content"] for message in row["messages"])
    again = CachedChatModel(chat, tmp_path / "replies")
    assert magpie(again, 6, seed=3, **settings)[0] == rows and again.asked == 0
    with row_file(tmp_path / "rows.parquet") as file:
        file.write_rows(rows)
    assert list(read_rows(tmp_path / "rows.parquet")) == rows
