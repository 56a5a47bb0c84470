"""Reward and value models: logits and gradients equal the model's own, on unique tokens only."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from fastpost.backbone import FastpostWarning
from fastpost.pooling import accelerate_pooled, pooled_places

VOCAB, PAD, EOS = 101, 0, 2
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "num_labels": 1,
}


def classifier(model_class=LlamaForSequenceClassification, config_class=LlamaConfig, **config):
    torch.manual_seed(0)
    return model_class(config_class(**SIZES | config))


def rows() -> list[list[int]]:
    """Two rows with one beginning, one within the other, one apart, one of a single token."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, VOCAB, (12,), generator=generator).tolist()
    other = torch.randint(3, VOCAB, (9,), generator=generator).tolist()
    return [[*prompt, 3, 4, 5, EOS], [*prompt, 7, EOS], prompt, [*other, EOS], [8]]


def batch(side: str = "right", pad: int = PAD) -> dict[str, torch.Tensor]:
    width = max(map(len, rows())) + 2
    ids = torch.full((len(rows()), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows()):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_logits_and_gradients(stock, ours, inputs, atol=1e-5) -> None:
    expected, actual = stock(**inputs), ours(**inputs)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.logits, expected.logits, atol=atol, rtol=1e-5)
    weights = torch.randn(expected.logits.shape, generator=torch.Generator().manual_seed(0))
    (expected.logits * weights).sum().backward()
    (actual.logits * weights).sum().backward()
    assert_same_gradients(stock, ours)


def assert_same_gradients(stock, ours, atol=1e-5) -> None:
    compared = 0
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            largest = max(1.0, float(theirs.grad.abs().max()))
            torch.testing.assert_close(
                mine.grad, theirs.grad, atol=atol * largest, rtol=0, msg=name
            )
            compared += bool(theirs.grad.any())
    assert compared


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [PAD, EOS], ids=["pad", "pad-is-eos"])
def test_pooled_logits_and_gradients_equal_the_models_own(side, pad) -> None:
    stock = classifier(pad_token_id=pad, num_labels=3)
    ours = copy.deepcopy(stock)
    engine = accelerate_pooled(ours)
    stock.train(), ours.train()
    inputs = batch(side, pad)
    assert_same_logits_and_gradients(stock, ours, inputs)
    stats = engine.stats
    assert stats.unique_tokens < stats.row_tokens < stats.padded_tokens
    assert stats.scored_tokens == len(rows())
    assert engine.packed_forwards == 1 and not engine.fallbacks


def test_a_wrong_place_would_be_noticed() -> None:
    """The comparison above can fail: the token before the pooled one has another logit."""
    stock = classifier()
    inputs = batch()
    places = pooled_places(stock, inputs["input_ids"])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[torch.arange(len(places)), (places - 1).clamp(min=0)] = True
    expected = stock(**inputs).logits
    accelerate_pooled(stock)
    wrong = stock(**inputs, value_mask=mask).logits[mask]
    assert float((wrong - expected)[:4].detach().abs().min()) > 1e-2


def test_padding_id_as_end_of_sequence_pools_before_it() -> None:
    model = classifier(pad_token_id=EOS)
    ids = batch(pad=EOS)["input_ids"]
    assert pooled_places(model, ids).tolist() == [14, 12, 11, 8, 0]


def test_tokens_behind_the_pooled_place_are_not_computed() -> None:
    model = classifier(pad_token_id=EOS).train()
    engine = accelerate_pooled(model)
    # Without a mask every padding token belongs to its row, and none of them is needed.
    model(input_ids=batch(pad=EOS)["input_ids"])
    assert engine.stats.row_tokens == engine.stats.padded_tokens
    assert engine.stats.unique_tokens == 12 + 3 + 1 + 9 + 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_packed_as_well(mode) -> None:
    model = classifier().eval()
    expected = model(**batch()).logits
    engine = accelerate_pooled(model)
    with mode():
        actual = model(**batch(), use_cache=False).logits
    torch.testing.assert_close(actual, expected.detach(), atol=1e-5, rtol=1e-5)
    assert engine.packed_forwards == 1 and not engine.fallbacks


@pytest.mark.parametrize(
    "model_class", [LlamaForTokenClassification, LlamaForSequenceClassification]
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_values_at_marked_places(model_class, side) -> None:
    ours = classifier(model_class, classifier_dropout=0.0, num_labels=2)
    stock = copy.deepcopy(ours)
    if model_class is LlamaForSequenceClassification:
        everywhere = stock.score(stock.model(**batch(side)).last_hidden_state)
    else:
        everywhere = stock(**batch(side)).logits
    engine = accelerate_pooled(ours)
    inputs = batch(side)
    mask = inputs["attention_mask"].bool() & (torch.rand(inputs["input_ids"].shape) < 0.5)
    mask[2] = False
    actual = ours(**inputs, value_mask=mask).logits
    expected = everywhere * mask[..., None]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert_same_gradients(stock, ours)
    assert engine.packed_forwards == 1 and not engine.fallbacks


def test_values_of_no_place_stay_connected() -> None:
    model = classifier(LlamaForTokenClassification).train()
    accelerate_pooled(model)
    inputs = batch()
    values = model(**inputs, value_mask=torch.zeros_like(inputs["input_ids"]).bool()).logits
    assert not values.any()
    values.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# PEFT's "all-linear" would take the head of a token classifier too, and then refuse to save it.
LORA = {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_peft_with_its_saved_head(task, use_dora) -> None:
    model_class = {
        "SEQ_CLS": LlamaForSequenceClassification,
        "TOKEN_CLS": LlamaForTokenClassification,
    }[task]
    stock = get_peft_model(
        classifier(model_class, classifier_dropout=0.0),
        LoraConfig(**LORA, task_type=task, use_dora=use_dora, init_lora_weights=False),
    )
    ours = copy.deepcopy(stock)
    engine = accelerate_pooled(ours)
    stock.train(), ours.train()
    if task == "SEQ_CLS":
        assert_same_logits_and_gradients(stock, ours, batch())
    else:
        mask = batch()["attention_mask"].bool()
        expected = stock(**batch()).logits * mask[..., None]
        actual = ours(**batch(), value_mask=mask).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        expected.sum().backward(), actual.sum().backward()
        assert_same_gradients(stock, ours)
    trained = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert any("score.modules_to_save" in name for name in trained)
    assert engine.packed_forwards == 1 and not engine.fallbacks


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant) -> None:
    stock = classifier()
    ours = copy.deepcopy(stock).train()
    stock.train()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    engine = accelerate_pooled(ours)
    assert_same_logits_and_gradients(stock, ours, batch())
    assert engine.packed_forwards == 1


def test_bf16_autocast_agrees_as_far_as_bf16_does() -> None:
    exact = classifier(num_labels=4)
    stock, ours = copy.deepcopy(exact), copy.deepcopy(exact)
    accelerate_pooled(ours)
    truth = exact(**batch()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = stock(**batch()).logits, ours(**batch()).logits
    assert actual.dtype == expected.dtype == torch.bfloat16
    theirs = float((expected - truth).detach().norm())
    error = float((actual - truth).detach().norm())
    assert 0 < error <= 2 * theirs + 1e-2 * float(truth.detach().norm())


FAMILIES = {
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config, {}),
    "gemma2-eager": (
        Gemma2ForSequenceClassification,
        Gemma2Config,
        {"head_dim": 8, "sliding_window": 6, "attn_implementation": "eager"},
    ),
    "mixtral": (MixtralForSequenceClassification, MixtralConfig, {"num_local_experts": 4}),
}


@pytest.mark.parametrize(("model_class", "config_class", "config"), FAMILIES.values(), ids=FAMILIES)
def test_other_families(model_class, config_class, config) -> None:
    stock = classifier(model_class, config_class, **config)
    ours = copy.deepcopy(stock).train()
    stock.train()
    engine = accelerate_pooled(ours)
    assert_same_logits_and_gradients(stock, ours, batch(), atol=3e-5)
    assert engine.packed_forwards == 1 and not engine.fallbacks


def test_a_family_that_cannot_be_packed_runs_padded() -> None:
    stock = classifier(GemmaForSequenceClassification, GemmaConfig, head_dim=8)
    ours = copy.deepcopy(stock).train()
    stock.train()
    engine = accelerate_pooled(ours)
    with pytest.warns(FastpostWarning, match="not packed"):
        assert_same_logits_and_gradients(stock, ours, batch())
    assert engine.packed_forwards == 0 and sum(engine.fallbacks.values()) == 1
    assert "packing off" in engine.report() and "fell back 1x" in engine.report()


def test_an_encoder_keeps_its_own_forward() -> None:
    stock = classifier(
        BertForSequenceClassification, BertConfig, hidden_dropout_prob=0.0, num_labels=1
    ).eval()
    ours = copy.deepcopy(stock)
    engine = accelerate_pooled(ours)
    with pytest.warns(FastpostWarning, match="own forward ran"):
        actual = ours(**batch()).logits
    assert torch.equal(actual, stock(**batch()).logits)
    with pytest.raises(ValueError, match="value_mask"):
        ours(**batch(), value_mask=batch()["attention_mask"].bool())
    assert list(engine.fallbacks.values()) == [1]


OWN_FORWARD = {
    "labels": ({"labels": torch.zeros(5)}, "labels"),
    "cache": ({"use_cache": True}, "use_cache"),
    "hidden-states": ({"output_hidden_states": True}, "output_hidden_states"),
}


@pytest.mark.parametrize(("extra", "reason"), OWN_FORWARD.values(), ids=OWN_FORWARD)
def test_calls_for_more_than_logits_reach_the_models_own_forward(extra, reason) -> None:
    stock = classifier().eval()
    ours = copy.deepcopy(stock)
    engine = accelerate_pooled(ours)
    with pytest.warns(FastpostWarning, match=reason):
        actual = ours(**batch(), **extra)
    expected = stock(**batch(), **extra)
    assert torch.equal(actual.logits, expected.logits)
    assert actual.keys() == expected.keys() and len(expected) > 1
    assert engine.packed_forwards == 0


def test_another_padding_id_than_the_configs_is_said() -> None:
    """The model pools at a padding token then, ours and theirs alike; only ours says so."""
    stock = classifier(pad_token_id=PAD).eval()
    ours = copy.deepcopy(stock)
    accelerate_pooled(ours)
    inputs = batch(pad=EOS)
    with pytest.warns(FastpostWarning, match="pooled at a masked token"):
        actual = ours(**inputs).logits
    assert torch.equal(actual, stock(**inputs).logits)


def test_no_padding_id() -> None:
    stock = classifier(pad_token_id=None).eval()
    ours = copy.deepcopy(stock)
    engine = accelerate_pooled(ours)
    one = {"input_ids": batch()["input_ids"][:1, :16]}
    torch.testing.assert_close(ours(**one).logits, stock(**one).logits, atol=1e-5, rtol=1e-5)
    assert engine.packed_forwards == 1
    with (
        pytest.warns(FastpostWarning, match="pad_token_id"),
        pytest.raises(ValueError, match="pad"),
    ):
        ours(**batch())


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    model = classifier()
    accelerate_pooled(model)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.score.weight)
    assert not twin(**batch()).logits.any()
    assert model(**batch()).logits.all()


def test_remove_restores_the_model_exactly() -> None:
    model = classifier().eval()
    before = {id(module): dict(module.__dict__) for module in model.modules()}
    expected = model(**batch()).logits
    engine = accelerate_pooled(model)
    assert "forward" in model.__dict__
    twin = copy.deepcopy(model)
    engine.remove()
    assert {id(module): dict(module.__dict__) for module in model.modules()} == before
    assert torch.equal(model(**batch()).logits, expected)
    assert torch.equal(twin(**batch()).logits, expected)
    with pytest.raises(ValueError, match="removed"):
        twin(**batch(), value_mask=batch()["attention_mask"].bool())


def test_wrong_models_are_refused() -> None:
    with pytest.raises(TypeError, match="accelerate_model"):
        accelerate_pooled(LlamaForCausalLM(LlamaConfig(**SIZES)))
    with pytest.raises(TypeError, match="Linear"):
        accelerate_pooled(torch.nn.Linear(2, 2))


def test_a_head_that_is_not_score_is_refused() -> None:
    class Negated(LlamaForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = -output.logits
            return output

    model = classifier(Negated)
    with pytest.raises(ValueError, match="not `score`"):
        accelerate_pooled(model)
    assert "forward" not in model.__dict__


def test_a_token_classifier_without_a_mask_gives_every_logit() -> None:
    """Asked in inference it is what was wanted; in training it costs, and is said."""
    stock = classifier(LlamaForTokenClassification, classifier_dropout=0.0).eval()
    ours = copy.deepcopy(stock)
    engine = accelerate_pooled(ours)
    with torch.no_grad():
        assert torch.equal(ours(**batch()).logits, stock(**batch()).logits)
    assert not engine.fallbacks
    with pytest.warns(FastpostWarning, match="value_mask"):
        ours.train()(**batch())


def test_a_mask_of_another_shape_is_refused() -> None:
    model = classifier(LlamaForTokenClassification)
    accelerate_pooled(model)
    with pytest.raises(ValueError, match="value_mask must be bool"):
        model(**batch(), value_mask=batch()["attention_mask"])
    with pytest.raises(ValueError, match="value_mask must be bool"):
        model(**batch(), value_mask=batch()["attention_mask"].bool()[:, :-1])
