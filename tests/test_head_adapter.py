"""LoRA on lm_head: through the kernel, equal to the model's own forward, or refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastpost
from fastpost.scoring import FastpostWarning

VOCAB = 101


def adapted(tied: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny Llama with LoRA on lm_head and q_proj; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on tied embeddings
        return get_peft_model(
            LlamaForCausalLM(config).to(dtype),
            LoraConfig(target_modules=["lm_head", "q_proj"], **settings),
        )


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB, (3, 14))
    ids[1, :6] = ids[0, :6]
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    labels = ids.where(mask.bool(), -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    found = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return found.masked_fill(labels == -100, 0.0)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Any, stock: Any) -> None:
    expected, found = trained(stock), trained(ours)
    assert found.keys() == expected.keys()
    assert sum("lm_head" in name for name in found) == 2
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_training_loss_and_gradients_equal_the_models_own(batch: Any, tied: bool) -> None:
    stock, ours = adapted(tied).train(), adapted(tied).train()
    engine = fastpost.accelerate_model(ours)
    expected = stock(**batch).loss
    loss = ours(**batch).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.backward()
    assert_same_gradients(ours, stock)
    assert engine.packed_forwards == 1 and not engine.fallbacks


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_log_probs_and_gradients_equal_the_models_own(batch: Any, tied: bool) -> None:
    stock, ours = adapted(tied).train(), adapted(tied).train()
    fastpost.accelerate_model(ours)
    coefficients = torch.randn(3, 13)
    expected = stock_log_probs(stock, batch)
    found = ours(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    (expected * coefficients).sum().backward()
    (found * coefficients).sum().backward()
    assert_same_gradients(ours, stock)


def test_a_disabled_adapter_leaves_the_bare_head(batch: Any) -> None:
    stock, ours = adapted(), adapted()
    fastpost.accelerate_model(ours)
    with ours.disable_adapter(), stock.disable_adapter():
        found = ours(**batch, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, stock_log_probs(stock, batch), atol=2e-5, rtol=1e-5)
    again = ours(**batch, fused_lm_head=True).log_probs
    assert not torch.allclose(found, again, atol=1e-2)


def test_the_active_one_of_two_adapters_is_taken(batch: Any) -> None:
    stock, ours = adapted(), adapted()
    for model in (stock, ours):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.set_adapter("second")
    fastpost.accelerate_model(ours)
    found = ours(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, stock_log_probs(stock, batch), atol=2e-5, rtol=1e-5)


def test_an_fp32_adapter_over_a_bf16_model(batch: Any) -> None:
    """PEFT's default: gradients come in the adapter's own dtype, near those of the fp32 model."""
    exact, ours = adapted().train(), adapted(dtype=torch.bfloat16).train()
    fastpost.accelerate_model(ours)
    exact(**batch).loss.backward()
    ours(**batch).loss.backward()
    for name, gradient in trained(exact).items():
        if "lm_head" in name:
            mine = trained(ours)[name]
            assert mine.dtype == torch.float32
            assert (mine - gradient).norm() < 0.1 * gradient.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout 0.1"),
        ({"use_dora": True}, "variant"),
    ],
    ids=["dropout", "dora"],
)
def test_other_adapters_train_through_the_models_own_forward(
    batch: Any, options: dict[str, Any], message: str
) -> None:
    model = adapted(**options).train()
    with pytest.warns(FastpostWarning, match=message):
        engine = fastpost.accelerate_model(model)
        model(**batch).loss.backward()
    assert sum("lm_head" in name for name in trained(model)) >= 2
    assert any(message in reason for reason in engine.fallbacks)
    with pytest.raises(ValueError, match=message):
        model(**batch, fused_lm_head=True)


def test_dropout_is_none_in_evaluation(batch: Any) -> None:
    stock, ours = adapted(lora_dropout=0.1).eval(), adapted(lora_dropout=0.1).eval()
    fastpost.accelerate_model(ours)
    found = ours(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, stock_log_probs(stock, batch), atol=2e-5, rtol=1e-5)


def test_a_merged_adapter_is_named(batch: Any) -> None:
    model = adapted()
    fastpost.accelerate_model(model)
    model.base_model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weight"):
        model(**batch, fused_lm_head=True)
    model.base_model.unmerge_adapter()
    assert model(**batch, fused_lm_head=True).log_probs.isfinite().all()


def test_rows_of_a_pair_refuse_the_adapter() -> None:
    model = adapted()
    engine = fastpost.accelerate_model(model)
    base = model.get_base_model()
    hidden, targets = torch.zeros(2, 32), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="scored together"):
        engine.head.rows(base, hidden, targets, None)
    with model.disable_adapter():
        assert engine.head.rows(base, hidden, targets, None).weight.shape == (VOCAB, 32)


def test_two_adapters_at_once_and_other_tuners_are_named(batch: Any) -> None:
    model = adapted()
    fastpost.accelerate_model(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"more than one is active \(default, second\)"):
        model(**batch, fused_lm_head=True)
    base = adapted().unload()
    scaled = get_peft_model(base, IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    fastpost.accelerate_model(scaled)
    with pytest.raises(ValueError, match="not plain LoRA"):
        scaled(**batch, fused_lm_head=True)
