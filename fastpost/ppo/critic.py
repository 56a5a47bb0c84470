"""Who says what a prefix is worth: a head on the policy's hidden states, or a model of its own.

Either one hangs below the policy while training runs, so that optimizer, gradient clipping and data
parallelism see one model, and is taken off while the policy is written: the policy's files load
into any transformers or PEFT model, and the critic has a file of its own beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VALUE_HEAD, VALUE_MODEL = "value_head", "value_model"


class ValueHead(nn.Linear):
    """V(s_t) = w · h_t + b, w = 0 at the beginning; at least fp32, also under autocast.

    With w = 0 the head's first gradients do not disturb the trunk; `Critic.start_at` gives b.
    Values of 16 bits would be 0.4 % apart.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        super().__init__(hidden_size, 1, dtype=dtype, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[M, H]` → `[M, 1]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


class Critic:
    """The critic below a policy.

    Args:
        policy: a causal language model, without any wrapper.
        value_model: a classifier of one label; None puts a `ValueHead` on the policy.

    Attributes:
        module: the value head or the value model.

    Raises:
        ValueError: the value model has several labels, or is the policy or shares its weights.
    """

    def __init__(self, policy: Any, value_model: nn.Module | None) -> None:
        self.model_is_separate = value_model is not None
        self._policy = policy
        self._name = VALUE_MODEL if self.model_is_separate else VALUE_HEAD
        self.module: nn.Module
        if value_model is None:
            weight = policy.get_output_embeddings().weight
            self.module = ValueHead(weight.shape[1], weight.dtype, weight.device)
        else:
            _refuse_unfit(policy, value_model)
            self.module = value_model
        setattr(policy, self._name, self.module)

    def start_at(self, level: float) -> float:
        """Let an untrained value head begin at the mean return.

        Scores of a reward model mean something up to a constant only. From 0 the head would walk
        there in steps of the learning rate, and on its way add its error to every advantage, most
        to those of the last tokens, where λ < 1 discounts it least: replies grow longer or shorter
        with the sign of the constant.

        Returns:
            By how much all values rise: 0 for a head that was trained, and for a value model.
        """
        if self.model_is_separate or any(bool(p.any()) for p in self.module.parameters()):
            return 0.0
        nn.init.constant_(self.module.bias, level)  # type: ignore[arg-type]
        return level

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """The policy as it is without its critic."""
        delattr(self._policy, self._name)
        try:
            yield
        finally:
            setattr(self._policy, self._name, self.module)

    def save(self, folder: str | Path) -> None:
        """Write the trained parameters to `value_head.safetensors` or `value_model.safetensors`."""
        tensors = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }
        save_file(tensors, self._file(folder))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds other parameters.
        """
        file = self._file(folder)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: the checkpoint was not written by PPOTrainer, or by one "
                f"{'without' if self.model_is_separate else 'with'} value_model"
            )
        saved = load_file(file)
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(
                f"{file} holds {len(saved)} parameters of other names or shapes than the "
                f"{len(trained)} trained ones of this {type(self.module).__name__}"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def is_saved_in(self, folder: str | Path) -> bool:
        """Whether `folder` has this critic's file."""
        return self._file(folder).is_file()

    def _file(self, folder: str | Path) -> Path:
        return Path(folder) / f"{self._name}.safetensors"


def _refuse_unfit(policy: nn.Module, value_model: Any) -> None:
    labels = getattr(getattr(value_model, "config", None), "num_labels", None)
    if labels != 1:
        raise ValueError(
            f"value_model must be a sequence or token classifier with num_labels=1, got "
            f"{type(value_model).__name__} with {labels}"
        )
    pointers = {p.data_ptr() for p in policy.parameters()}
    for name, parameter in value_model.named_parameters():
        if parameter.numel() and parameter.data_ptr() in pointers:
            raise ValueError(
                f"value_model shares '{name}' with the policy; load it separately, or leave "
                "value_model out: a value head on the policy's own trunk is the default"
            )


__all__ = ["Critic", "ValueHead"]
