"""Two steps of `fastpost sft`, then two of `fastpost dpo` on its result, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow(minutes=4)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def fastpost(cwd: Path, *argv: str) -> str:
    command = [sys.executable, "-m", "fastpost.cli.main", *argv]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sft_then_dpo(tmp_path: Path, tiny_model: Path) -> None:
    question = [{"role": "user", "content": "What is two and two?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Four.", "Five, I think.")]
    sft_row = {"messages": question + answers[0]}
    dpo_row = {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
    (tmp_path / "sft.jsonl").write_text((json.dumps(sft_row) + "\n") * 4)
    (tmp_path / "dpo.jsonl").write_text((json.dumps(dpo_row) + "\n") * 4)
    (tmp_path / "recipe.yaml").write_text(
        "max_steps: 2\nper_device_train_batch_size: 2\nlogging_steps: 1\nsave_strategy: no\n"
        "report_to: none\nuse_cpu: true\nbf16: false\ngradient_checkpointing: false\n"
    )
    common = ("--config", "recipe.yaml")
    out = fastpost(
        tmp_path, "sft", *common, "--model", str(tiny_model), "--dataset", "sft.jsonl",
        "--output_dir", "sft-model",
    )  # fmt: skip
    assert "sft step 1/2 |" in out
    assert "sft step 2/2 | ETA 0:00:00 |" in out
    assert f"Saved to {tmp_path / 'sft-model'}" in out
    assert (tmp_path / "sft-model" / "model.safetensors").is_file()
    assert (tmp_path / "sft-model" / "tokenizer.json").is_file()

    out = fastpost(
        tmp_path, "dpo", *common, "--model", "./sft-model", "--ref_model", "./sft-model",
        "--dataset", "dpo.jsonl", "--output_dir", "dpo-model", "--learning_rate", "1e-3",
    )  # fmt: skip
    last = next(line for line in out.splitlines() if line.startswith("dpo step 2/2"))
    assert "tokens/s" in last
    assert "rewards/accuracies" in last
    saved = float(last.split("% of padded tokens saved")[0].split("|")[-1])
    assert saved > 0  # the prompt of a pair is processed once
    assert (tmp_path / "dpo-model" / "model.safetensors").is_file()

    fastpost(
        tmp_path, "dpo", *common, "--model", "./sft-model", "--dataset", "dpo.jsonl",
        "--output_dir", "dpo-adapter", "--lora_r", "4",
    )  # fmt: skip
    assert (tmp_path / "dpo-adapter" / "adapter_model.safetensors").is_file()
