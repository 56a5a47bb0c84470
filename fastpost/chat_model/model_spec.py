"""A chat model from a few plain settings, as commands and files of judges give them.

{model: gpt-x, endpoint: "https://host/v1/chat/completions", api_key_env: KEY}
{model: ./my-model, temperature: 0.7}                       # on this machine
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastpost.chat_model.endpoint import EndpointChatModel
from fastpost.chat_model.interface import ChatModel, Sampling
from fastpost.chat_model.usage import Price

__all__ = ["ModelSpec", "weights_name"]

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_ENDPOINT_ONLY = {
    "api_key_env",
    "concurrency",
    "timeout_seconds",
    "attempts",
    "prompt_price",
    "reply_price",
}


@dataclass(frozen=True)
class ModelSpec:
    """Settings of a chat model; None leaves a setting at what the model has for it.

    Attributes:
        model: name at the endpoint; without one, a folder or a hub name.
        endpoint: address, ending in `/chat/completions`.
        api_key_env: environment variable that holds the key.
        temperature, top_p, max_tokens: as `Sampling`.
        concurrency, timeout_seconds, attempts: as `EndpointChatModel`.
        prompt_price, reply_price: of a million tokens at the endpoint.
        batch_size: conversations at once, of a local model.

    Raises:
        ValueError: no model, a setting of the other kind of model, or a value out of range.
    """

    model: str
    endpoint: str | None = None
    api_key_env: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    concurrency: int | None = None
    timeout_seconds: float | None = None
    attempts: int | None = None
    prompt_price: float | None = None
    reply_price: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model is {self.model!r}; give a name or a folder")
        strangers = {"batch_size"} if self.endpoint is not None else _ENDPOINT_ONLY
        for name in sorted(strangers):
            if getattr(self, name) is not None:
                kind = "a local model" if self.endpoint is not None else "an endpoint"
                raise ValueError(f"{name} is given, which is a setting of {kind}")
        self.sampling()

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> ModelSpec:
        """From a file's entry.

        Raises:
            ValueError: unknown settings, and as the class.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown or "model" not in given:
            what = f"unknown settings {', '.join(unknown)}" if unknown else "no setting model"
            raise ValueError(f"{what}; there are {', '.join(known)}")
        try:
            return cls(**given)
        except TypeError as error:  # a text where a number is compared
            raise ValueError(f"a setting is of the wrong kind: {error}") from error

    def sampling(self) -> Sampling:
        """How replies are sampled."""
        return Sampling(self.temperature, self.top_p, self.max_tokens)

    def open(self) -> ChatModel:
        """The model: an endpoint is not asked yet, a local one is loaded.

        Raises:
            ValueError: the environment has no such key, or no such model can be loaded.
        """
        if self.endpoint is None:
            return self._local()
        key = None
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ValueError(f"the environment variable {self.api_key_env} is not set")
        names = ("concurrency", "timeout_seconds", "attempts")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        price = None
        if self.prompt_price is not None or self.reply_price is not None:
            price = Price(self.prompt_price or 0.0, self.reply_price or 0.0)
        return EndpointChatModel(
            self.endpoint, self.model, sampling=self.sampling(), api_key=key, price=price, **given
        )

    def _local(self) -> ChatModel:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy

        from fastpost.chat_model.local import LocalChatModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"model {self.model} cannot be loaded: {error}") from error
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        given = {} if self.batch_size is None else {"batch_size": self.batch_size}
        commit = getattr(model.config, "_commit_hash", None)
        name = weights_name(self.model) if commit is None else f"{self.model}@{commit[:12]}"
        return LocalChatModel(model, tokenizer, name, sampling=self.sampling(), **given)


def weights_name(folder: str | Path) -> str:
    """A folder's name and 12 digits that change with its weights, settings and tokenizer.

    What is no folder keeps its name.

    Of each file its name, size and samples of its bytes count: a model trained further has another
    name, and 60 GB are not read for it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        return str(folder)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"
