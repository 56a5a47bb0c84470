"""No tensor of a training step grows with tokens times vocabulary, in any method.

Every tensor made in the forward, the backward and the optimizer is looked at, also inside our own
operators, for a vocabulary and for one four times as large. Tensors of the size of the head's
weight are its gradient and its optimizer state, and are left out.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.trainers import conftest, methods
from tests.trainers.methods import METHODS

VOCAB, HIDDEN = 1024, 64
BUDGET_GB = 1e-4  # room for 26 rows of the small vocabulary in fp32, and 6 of the large one


class Largest(TorchDispatchMode):
    """Bytes of the largest storage made inside, without weight-sized ones, and what made it."""

    def __init__(self, weight_numel: int) -> None:
        super().__init__()
        self.weight_bytes = weight_numel * torch.float32.itemsize
        self.bytes, self.where = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        custom = _definition(func)
        if custom is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:  # its workspace is made by the operators it calls
                result = custom._init_fn(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                if size > self.bytes and size != self.weight_bytes:
                    self.bytes, self.where = size, f"{func} -> {tuple(tensor.shape)}"
        return result


def _definition(func: Any) -> CustomOpDef | None:
    """The Python operator behind an overload, None for PyTorch's own."""
    return torch._library.custom_ops._maybe_get_opdef(func)


def largest_tensor(name: str, vocab: int, folder: Any, **config: Any) -> Largest:
    method = METHODS[name]
    budget = {} if name in ("Reward", "PRM") else {"memory_budget_gb": BUDGET_GB}
    settings = methods.settings_of(method, folder / name, **budget, **config)
    model = method.model(vocab_size=vocab)
    model.config._name_or_path = str(folder / f"{name}-{vocab}")
    model.save_pretrained(model.config._name_or_path)  # where a reference is loaded from
    options = method.options(torch.float32)
    if "ref_model" in options:
        options["ref_model"] = conftest.tiny_model(vocab, seed=1)
    trainer = methods.build_trainer(method, settings, model, **options)
    largest = Largest(vocab * HIDDEN)
    with warnings.catch_warnings(), largest:
        warnings.simplefilter("ignore")
        trainer.train()
    trainer.engine.remove()
    return largest


FAST = {"SFT", "DPO", "GRPO"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow, id=n) for n in METHODS],
)
def test_largest_tensor_does_not_grow_with_the_vocabulary(name, tmp_path) -> None:
    small = largest_tensor(name, VOCAB, tmp_path)
    large = largest_tensor(name, 4 * VOCAB, tmp_path)
    assert small.bytes > 0
    assert large.bytes <= 1.5 * max(small.bytes, BUDGET_GB * 2**30), large.where


def test_logits_would_be_noticed(tmp_path) -> None:
    """Token smoothing needs every logit; the instrument sees them."""
    small = largest_tensor("SFT", VOCAB, tmp_path, label_smoothing_factor=0.1)
    large = largest_tensor("SFT", 4 * VOCAB, tmp_path, label_smoothing_factor=0.1)
    assert large.bytes > 3 * small.bytes
