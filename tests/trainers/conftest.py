"""A tiny model and tokenizer, and two trainers run from the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Reference log-probs of one test are no other test's."""
    monkeypatch.setattr("fastpost.reference_cache.cache_root", lambda: tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML with generation markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<|im_start|>", "<|im_end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(vocab_size: int, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        # Multiples of 32: PyTorch's 16-bit CPU GEMMs read past the end of other rows, and what
        # lies there may be NaN.
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    } | config
    return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_model(len(tokenizer))


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.fixture(scope="session")
def preference_data() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": _turn("user", f"what is {i} + {i + 1}? " + "think. " * (i % 4)),
                "chosen": _turn("assistant", f"it is {2 * i + 1}" + "!" * (i % 3)),
                "rejected": _turn("assistant", f"it is {i}, or so I say" + "?" * (i % 5)),
            }
            for i in range(24)
        ]
    )


@pytest.fixture(scope="session")
def prompt_completion_data(preference_data) -> Dataset:
    return preference_data.rename_column("chosen", "completion").remove_columns("rejected")


@pytest.fixture(scope="session")
def messages_data(preference_data) -> Dataset:
    return Dataset.from_list(
        [{"messages": row["prompt"] + row["chosen"]} for row in preference_data]
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of a tensor spread over processes, all of it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


@dataclass
class Trace(TrainerCallback):
    """What a run computed: loss and metrics per step, first gradients, last weights."""

    losses: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.logs.append(dict(logs))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: whole(p) for name, p in model.named_parameters()}


@pytest.fixture
def run_trainer(tmp_path, tokenizer):
    def run(trainer_class, config_class, model, dataset, trainer_options=None, **config) -> Any:
        settings = {
            "output_dir": str(tmp_path / trainer_class.__module__),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 3e-4,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 7,
        } | config
        trace = Trace()
        trainer = trainer_class(
            copy.deepcopy(model),
            args=config_class(**settings),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[trace],
            **copy.deepcopy(trainer_options or {}),
        )
        trainer.train()
        trainer.trace = trace
        return trainer

    return run


@pytest.fixture
def assert_same_run():
    def check(ours: Trace, stock: Trace, loss_atol=1e-5, weight_atol=1e-4, grad_rtol=1e-4) -> None:
        assert len(ours.losses) == len(stock.losses) >= 3
        torch.testing.assert_close(
            torch.tensor(ours.losses), torch.tensor(stock.losses), atol=loss_atol, rtol=0
        )
        assert ours.gradients.keys() == stock.gradients.keys() and ours.gradients
        for name, gradient in stock.gradients.items():
            error = (ours.gradients[name] - gradient).norm()
            assert error <= grad_rtol * gradient.norm() + 1e-7, name
        assert ours.weights.keys() == stock.weights.keys()
        for name, weight in stock.weights.items():
            torch.testing.assert_close(
                ours.weights[name],
                weight,
                atol=weight_atol,
                rtol=0,
                msg=lambda m, n=name: f"{n}: {m}",
            )

    return check
