"""A loop on a real model: SmolLM2-135M, trained on sums that it got right, gets more right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow(minutes=3)
def test_smollm2_teaches_itself_sums(tmp_path, monkeypatch) -> None:
    """40 % right greedy answers to held-out sums before, 63 % after two rounds, when measured."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "rejection_sampling", raising=False)
    import rejection_sampling

    result = rejection_sampling.main(str(tmp_path), rounds=2)
    before, *_, after = (entry["right"] for entry in result.metrics)
    print([entry["right"] for entry in result.metrics])
    assert 0.2 < before < 0.55 and after > before + 0.1
    solved = [entry["solved"] for entry in result.metrics[1:]]
    assert solved[-1] > solved[0]
