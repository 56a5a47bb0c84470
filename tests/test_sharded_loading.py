"""Loading a model spread over processes: none of them ever holds more than its part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.processes import run_processes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_process_holds_its_part_and_a_tensor_or_two(tmp_path: Path) -> None:
    for name, layers in (("small", 1), ("large", 24)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=8,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="20MB")
    files = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) > 8
    run_processes("tests.sharded_loading_child", tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["kept"] == pytest.approx(sum(files) / 2, rel=0.01)
        # on a CPU the part itself may be pages of the file, which count as the system's cache
        assert found["peak"] < found["kept"] + max(files) < 0.65 * sum(files)
