"""Every method as one row: its trainer, its data, and the smallest run that exercises it.

Tests that hold for all methods (options, invariance, processes, memory) run over `METHODS`; a new
trainer is covered by adding its row.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

import fastpost
from tests.trainers import conftest

disable_progress_bars()
NUM_ROWS = 12


@cache
def tokenizer() -> Any:
    found = conftest.tokenizer.__wrapped__()
    found.chat_template += "{% if loud %}!{% endif %}"  # for `chat_template_kwargs`
    return found


@cache
def preference_rows() -> Dataset:
    return conftest.preference_data.__wrapped__().select(range(NUM_ROWS))


def prompt_completion_rows() -> Dataset:
    return preference_rows().rename_column("chosen", "completion").remove_columns("rejected")


def prompt_rows() -> Dataset:
    return preference_rows().remove_columns(["chosen", "rejected"])


def unpaired_rows() -> Dataset:
    """Liked and disliked answers alternate, so that every batch has both."""
    rows = []
    for i, row in enumerate(preference_rows()):
        liked = i % 2 == 0
        completion = row["chosen"] if liked else row["rejected"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": liked})
    return Dataset.from_list(rows)


def step_rows() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"what is {i} + {i + 1}? " + "think. " * (i % 4),
                "completions": [f"start at {i}." + "!" * (i % 3), f"add {i + 1}", f"get {2 * i}"],
                "labels": [True, i % 2 == 0, False],
            }
            for i in range(NUM_ROWS)
        ]
    )


def causal_model(**config: Any) -> Any:
    return conftest.tiny_model(**{"vocab_size": len(tokenizer()), **config})


def classifier(architecture: type[Any], num_labels: int) -> Callable[..., Any]:
    def build(**config: Any) -> Any:
        settings = causal_model(**config).config
        settings.num_labels = num_labels
        torch.manual_seed(config.get("seed", 0))
        return architecture(settings)

    return build


def letter_sum(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs between completions whatever a random model writes."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum((i + 1) * ord(a) for i, a in enumerate(text)) % 97 / 97 for text in texts]


@dataclass(frozen=True)
class Method:
    """One trainer.

    Attributes:
        data: the rows it is trained on.
        settings: config fields of the smallest run.
        model: builds the policy; keyword arguments go to its config.
        options: further constructor arguments, from the policy's dtype.
    """

    name: str
    data: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    model: Callable[..., Any] = causal_model
    options: Callable[[torch.dtype], dict[str, Any]] = lambda dtype: {}

    @property
    def trainer_class(self) -> Any:
        return getattr(fastpost, f"{self.name}Trainer")

    @property
    def config_class(self) -> Any:
        return getattr(fastpost, f"{self.name}Config")


def other_reference(dtype: torch.dtype) -> dict[str, Any]:
    """A reference with other weights, so that log-ratios are not zero."""
    return {"ref_model": causal_model(seed=1).to(dtype)}


def a_reward(dtype: torch.dtype) -> dict[str, Any]:
    return {"reward_funcs": letter_sum}


ROLLOUT = {"num_generations": 2, "max_completion_length": 8, "temperature": 1.0}

METHODS = {
    method.name: method
    for method in (
        Method("SFT", prompt_completion_rows),
        Method("DPO", preference_rows, options=other_reference),
        Method("KTO", unpaired_rows, options=other_reference),
        Method("CPO", preference_rows),
        Method("ORPO", preference_rows),
        Method("Reward", preference_rows, model=classifier(LlamaForSequenceClassification, 1)),
        Method("PRM", step_rows, model=classifier(LlamaForTokenClassification, 1)),
        Method("GRPO", prompt_rows, settings=ROLLOUT, options=a_reward),
        Method("RLOO", prompt_rows, settings=ROLLOUT, options=a_reward),
        Method(
            "OnlineDPO",
            prompt_rows,
            settings={"max_new_tokens": 8, "max_length": 64, "temperature": 1.0},
            options=a_reward,
        ),
        Method("PPO", prompt_rows, settings=ROLLOUT, options=a_reward),
    )
}


@cache
def saved_model(method_name: str, folder: Path) -> Path:
    """The policy on disk, where trainers look for a copy of it to serve as the reference."""
    path = folder / f"{method_name}-policy"
    METHODS[method_name].model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def settings_of(method: Method, output_dir: Path, **config: Any) -> dict[str, Any]:
    """Config fields of a short, silent run on the CPU."""
    return (
        {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 3e-4,
            "max_grad_norm": 0.0,  # clipping would hide a factor
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 7,
        }
        | method.settings
        | config
    )


def build_trainer(
    method: Method,
    config: Any,
    model: Any,
    data: Dataset | None = None,
    library: Any = fastpost,
    **options: Any,
) -> Any:
    """The method's trainer, with a `Trace`. `model` is trained as it is, a path is loaded.

    `config` holds the fields of its configuration, or is one. `library` is `trl` for a trainer of
    TRL's.
    """
    if isinstance(config, dict):
        config = getattr(library, f"{method.name}Config")(**config)
    trace = conftest.Trace()
    dtype = torch.float32 if isinstance(model, str) else model.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(library, f"{method.name}Trainer")(
            model,
            args=config,
            train_dataset=method.data() if data is None else data,
            processing_class=copy.deepcopy(tokenizer()),  # trainers set its special tokens
            callbacks=[trace],
            **(options or method.options(dtype)),
        )
    trainer.trace = trace
    return trainer
