from __future__ import annotations

import pytest
import torch

from fastpost.ppo.completions import lay_out


def test_layout() -> None:
    batch = lay_out([[5, 6], [7]], [[8], [9, 10, 11]], 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 8, 0, 0], [0, 7, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert batch["response_mask"].tolist() == [[True, False, False], [True, True, True]]


def test_rows_that_nothing_could_predict() -> None:
    with pytest.raises(ValueError, match="prompt 1 of the batch has no token"):
        lay_out([[5], []], [[8], [9]], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="every sampled completion is empty"):
        lay_out([[5]], [[]], 0, torch.device("cpu"))
