"""A model spread at loading: no process ever holds more than its part and a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
FILE_BYTES = 16 << 20


@pytest.mark.slow
def test_a_process_holds_its_part_and_a_file(tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    weights = sum(p.nbytes for p in model.parameters())
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size=FILE_BYTES)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 8
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = ["-m", "tests.sharded_loading_child", str(tmp_path)]
    subprocess.run([*launch, *child], cwd=ROOT, check=True, timeout=300)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert sum(rank["sum"] for rank in ranks) == pytest.approx(total, abs=0.1, rel=1e-4)
    for rank in ranks:
        assert 0.3 * weights < rank["peak"] < 0.5 * weights + 3 * FILE_BYTES
