"""Trainers whose first step is measured: real models of SmolLM2's kind, real rows, on the CPU.

Rows are words of a vocabulary of numbers, so that their lengths are what a case asks for. Nothing
is shared with the planner but the configuration of the model: what it is asked is read off the
trainer (`fastpost.trainers.trial_plan`).
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import fastpost
from fastpost.planning.models import load_config
from fastpost.trainers.trial_step import Trial, TrialStep

__all__ = ["Case", "trial_of"]

MODEL = "HuggingFaceTB/SmolLM2-135M"
_WORDS = 1000


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        method: "SFT", "DPO", "Reward", "GRPO" or "RLOO".
        rows, prompt, answer: rows at once, and tokens of each.
        rank: of a LoRA adapter on all linear layers; None trains all weights.
        is_dora: DoRA in its place.
        settings: fields of the configuration.
        model: fields of the model's configuration that differ from SmolLM2-135M's.
        is_fitted: whether the planner was made with this case in view.
    """

    method: str
    rows: int
    prompt: int
    answer: int
    rank: int | None = None
    is_dora: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    is_fitted: bool = False


class _Enough(Exception):
    """The trial is over, and nothing is to be trained."""


class _StopThere(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Enough


def trial_of(case: Case) -> Trial:
    """What the trial step of a case says."""
    config = copy.deepcopy(load_config(MODEL))
    for name, value in case.model.items():
        setattr(config, name, value)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, config, folder)
        trainer.add_callback(_StopThere())
        with contextlib.suppress(_Enough):
            trainer.train()
        callbacks = trainer.callback_handler.callbacks
        found = next(c for c in callbacks if isinstance(c, TrialStep)).found
        trainer.engine.remove()
    assert found is not None
    return found


def _trainer(case: Case, config: Any, folder: str) -> Any:
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": case.rows,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "trial_step": True,
    } | case.settings
    is_wide = settings["bf16"] and case.rank is None
    auto = AutoModelForCausalLM
    if case.method == "Reward":
        auto, config.num_labels, config.pad_token_id = AutoModelForSequenceClassification, 1, 0
    model: Any = auto.from_config(config, dtype=torch.float32 if is_wide else torch.bfloat16)
    arguments: dict[str, Any] = {"processing_class": _tokenizer()}
    if case.rank is not None:
        arguments["peft_config"] = LoraConfig(
            r=case.rank,
            lora_alpha=2 * case.rank,
            target_modules="all-linear",
            use_dora=case.is_dora,
            task_type="SEQ_CLS" if case.method == "Reward" else "CAUSAL_LM",
        )
    if case.method in ("GRPO", "RLOO"):
        settings |= {"num_generations": case.rows, "max_completion_length": case.answer}
        arguments["reward_funcs"] = [lambda completions, **_: [0.0] * len(completions)]
    else:
        settings["max_length"] = case.prompt + case.answer
    if case.method == "DPO" and case.rank is None:
        arguments["ref_model"] = copy.deepcopy(model)
    if case.settings.get("beta") and case.rank is None:  # TRL loads the reference from there
        model.config._name_or_path = f"{folder}/policy"
        model.save_pretrained(model.config._name_or_path)
    return getattr(fastpost, f"{case.method}Trainer")(
        model,
        args=getattr(fastpost, f"{case.method}Config")(**settings),
        train_dataset=_rows(case),
        **arguments,
    )


def _rows(case: Case) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        drawn = torch.randint(3, _WORDS, (count,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in drawn)

    rows = []
    for _ in range(max(2, case.rows)):
        row = {"prompt": words(case.prompt)} if case.prompt else {}
        if case.method == "SFT":
            row["text"] = words(case.answer)
        elif case.method in ("DPO", "Reward"):
            count = case.answer - 1  # an end token follows
            row |= {"chosen": " " + words(count), "rejected": " " + words(count)}
        rows.append(row)
    return Dataset.from_list(rows)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, _WORDS)}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<s>"
    )
