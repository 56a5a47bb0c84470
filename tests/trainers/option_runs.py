"""Two runs that differ in one option, each combination of options run once."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.trainers import footprint, methods
from tests.trainers.methods import METHODS
from tests.trainers.option_probes import CHAT_TEMPLATE_FILE


def experts(**_: Any) -> Any:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(methods.tokenizer()),
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=2,
            max_position_embeddings=512,
        )
    )


def two_texts() -> Dataset:
    rows = methods.preference_rows()
    return Dataset.from_list(
        [{"text": f"one {i} and so on", "other": f"other {i}!"} for i in range(len(rows))]
    )


def tokenised() -> Dataset:
    ids = [[3 + (i * j) % 200 for j in range(1, 12)] for i in range(methods.NUM_ROWS)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def number_of_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


def text_pairs() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i}+1?", "chosen": f" {i + 1}!", "rejected": " no"} for i in range(12)]
    )


def messages() -> Dataset:
    return Dataset.from_list(
        [{"messages": r["prompt"] + r["completion"]} for r in methods.prompt_completion_rows()]
    )


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a probe's two runs are built on, where it is not the method's own."""

    model: Any = None
    data: Any = None
    peft: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluates: bool = False
    from_disk: bool = False


SETUPS = {
    "plain": Setup(),
    "saved model": Setup(from_disk=True),
    "dropout": Setup(
        peft=LoraConfig(
            r=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
        )
    ),
    "experts": Setup(model=experts),
    "two texts": Setup(data=two_texts),
    "tokenised": Setup(data=tokenised),
    "text pairs": Setup(data=text_pairs),
    "two rewards": Setup(options={"reward_funcs": [methods.letter_sum, number_of_letters]}),
    "messages": Setup(data=messages),
    "evaluates": Setup(evaluates=True),
}


class Runs:
    """Footprints of runs, each combination of options run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.template = folder / "template.jinja"
        self.template.write_text("{% for m in messages %}<{{ m['content'] }}<|im_end|>{% endfor %}")
        self._known: dict[str, dict[str, Any]] = {}
        self._count = itertools.count()

    def footprint(self, name: str, setup: str, config: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps([name, setup, sorted(config.items())], default=str)
        if key not in self._known:
            self._known[key] = self.run(name, setup, config)
        return self._known[key]

    def run(self, name: str, setup_name: str, config: dict[str, Any]) -> dict[str, Any]:
        method, setup = METHODS[name], SETUPS[setup_name]
        output_dir = self.folder / f"run-{next(self._count)}"
        config = {
            k: str(self.template) if v == CHAT_TEMPLATE_FILE else v for k, v in config.items()
        }
        options: dict[str, Any] = {}
        data = method.data() if setup.data is None else setup.data()
        if setup.evaluates:
            options["eval_dataset"] = data
        if setup.peft is not None:
            adapter = copy.deepcopy(setup.peft)
            if method.model is not methods.causal_model:
                adapter.modules_to_save = ["score"]
            options |= {"peft_config": adapter, "ref_model": None}
        saved, watch = methods.saved_model(name, self.folder), footprint.Watch()
        model: Any = str(saved)
        if not setup.from_disk:
            model = (setup.model or method.model)()
            model.config._name_or_path = str(saved)
            watch.follow(model)
        options = method.options(torch.float32) | setup.options | options
        if options.get("ref_model") is None:
            options.pop("ref_model", None)
        else:
            if setup.model is not None:
                options["ref_model"] = setup.model()
            watch.follow(options["ref_model"])
        printed = io.StringIO()
        # Reference log-probs are kept across runs: each run gets a place of its own.
        cache = mock.patch.dict(os.environ, FASTPOST_CACHE=str(output_dir) + "-cache")
        with cache, footprint.recorded_calls() as calls:
            settings = methods.settings_of(method, output_dir, **config)
            trainer = methods.build_trainer(method, settings, model, data, **options)
            try:
                return footprint.run(trainer, watch, calls, printed)
            finally:
                trainer.engine.remove()
