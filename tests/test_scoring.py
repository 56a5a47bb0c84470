"""The installed forward: equal to the model's own where it takes over, absent where it does not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import fastpost
from fastpost.scoring import FastpostWarning

VOCAB = 101


def llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    } | config
    return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows, two with the same beginning, padded on the right, responses labelled."""
    torch.manual_seed(1)
    prompt = torch.randint(1, VOCAB, (12,)).tolist()
    rows = [prompt + [3, 4, 5, 6], prompt + [7, 8], torch.randint(1, VOCAB, (9,)).tolist()]
    labelled = [4, 2, 5]
    width = max(map(len, rows))
    ids, mask, labels = (torch.zeros(3, width, dtype=torch.int64) for _ in range(3))
    labels.fill_(-100)
    for i, (row, count) in enumerate(zip(rows, labelled, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(row) - count : len(row)] = torch.tensor(row[-count:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_logps(model, batch) -> torch.Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return logps.masked_fill(labels == -100, 0.0)


def test_log_probs_and_gradients_equal_the_models_own(batch) -> None:
    stock, ours = llama(), llama()
    engine = fastpost.accelerate_model(
        ours, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    )
    ours.train()
    expected = stock_logps(stock, batch)
    output = ours(**batch, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, expected, atol=2e-5, rtol=1e-5)
    probs = stock(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_p = probs.log_softmax(-1)
    mask = batch["labels"][:, 1:] != -100
    assert torch.equal(output.label_mask, mask)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(output.entropy[mask], entropy[mask], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.mean_logits[mask], probs.mean(-1)[mask], atol=2e-5, rtol=1e-4)
    top1 = probs.argmax(-1) == batch["labels"][:, 1:]
    assert torch.equal(output.is_top1.bool()[mask], top1[mask])
    collision = (2 * log_p).logsumexp(-1)
    torch.testing.assert_close(output.log_sum_sq_probs[mask], collision[mask], atol=2e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * weights).sum().backward()
    (output.log_probs * weights).sum().backward()
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-5, rtol=1e-4, msg=name)
    assert engine.stats.unique_tokens < engine.stats.row_tokens < engine.stats.padded_tokens
    assert engine.stats.scored_tokens == int(mask.sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_either_padding_side(batch, side) -> None:
    model = llama()
    fastpost.accelerate_model(model)
    expected = model(**batch, fused_lm_head=True).log_probs.sum(1)
    if side == "left":
        lengths = batch["attention_mask"].sum(1)
        width = batch["attention_mask"].shape[1]
        for i, length in enumerate(lengths.tolist()):
            for tensor in batch.values():
                tensor[i] = tensor[i].roll(width - length)
    actual = model(**batch, fused_lm_head=True).log_probs.sum(1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_shared_scored_tokens_are_scored_once(batch) -> None:
    """Two equal rows get equal log-probs, and each contributes its own gradient."""
    row = {name: tensor[:1] for name, tensor in batch.items()}
    twice = {name: tensor.repeat(2, 1) for name, tensor in row.items()}
    one, two = llama(), llama()
    fastpost.accelerate_model(one)
    engine = fastpost.accelerate_model(two)
    one.train(), two.train()
    (2 * one(**row, fused_lm_head=True).log_probs.sum()).backward()
    logps = two(**twice, fused_lm_head=True).log_probs
    torch.testing.assert_close(logps[0], logps[1], atol=0, rtol=0)
    logps.sum().backward()
    for mine, theirs in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    assert engine.stats.unique_tokens == int(row["attention_mask"].sum()) - 1


def test_training_with_labels_gives_the_stock_loss_without_logits(batch) -> None:
    stock, ours = llama().train(), llama().train()
    fastpost.accelerate_model(ours)
    for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
        expected = stock(**batch, **extra).loss
        output = ours(**batch, **extra)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    stock.zero_grad(), ours.zero_grad()
    stock(**batch).loss.backward()
    ours(**batch).loss.backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_plain_transformers_trainer(batch, tmp_path) -> None:
    rows = [{name: tensor[i].tolist() for name, tensor in batch.items()} for i in range(3)] * 4

    def train(model, name):
        args = TrainingArguments(
            str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        return trainer

    stock, ours = llama(), llama()
    engine = fastpost.accelerate_model(ours)
    stock_trainer, our_trainer = train(stock, "stock"), train(ours, "ours")
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert engine.packed_forwards >= 6
    # Evaluation keeps its logits.
    assert our_trainer.predict(rows[:3]).predictions.shape[-1] == VOCAB
    assert our_trainer.evaluate()["eval_loss"] == pytest.approx(
        stock_trainer.evaluate()["eval_loss"], abs=1e-4
    )


def test_generate_is_untouched(batch) -> None:
    model = llama()
    prompt = {name: batch[name][:2, :8] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **options)
    engine = fastpost.accelerate_model(model)
    assert torch.equal(model.generate(**prompt, **options), expected)
    assert engine.packed_forwards == 0


def test_remove_restores_the_model(batch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}
    model = llama().train()
    attributes, implementation = set(model.__dict__), model.config._attn_implementation
    expected = model(**batch).logits
    engine = fastpost.accelerate_model(model)
    assert model(**batch).logits is None
    engine.remove()
    engine.remove()
    assert set(model.__dict__) == attributes
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, expected)
    after = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}
    assert after == before


def test_installing_twice_replaces_the_first(batch) -> None:
    model = llama().train()
    first = fastpost.accelerate_model(model)
    second = fastpost.accelerate_model(model, prefix_sharing=False)
    assert not first.is_installed and second.is_installed
    model(**batch)
    assert second.stats.unique_tokens == second.stats.row_tokens - 3


def test_a_deep_copy_runs_its_own_weights(batch) -> None:
    model = llama()
    fastpost.accelerate_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    one, two = (m(**batch, fused_lm_head=True).log_probs for m in (model, other))
    assert not torch.allclose(one, two)
    torch.testing.assert_close(two, stock_logps(other, batch), atol=2e-5, rtol=1e-5)


def test_unknown_architecture_still_scores_unpacked(batch) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=64)
    ).eval()
    with pytest.warns(FastpostWarning, match="batch not packed"):
        engine = fastpost.accelerate_model(model)
        output = model(**batch, fused_lm_head=True)
        model(**batch, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, stock_logps(model, batch), atol=2e-5, rtol=1e-5)
    assert engine.packed_forwards == 0 and list(engine.fallbacks.values()) == [2]
    assert "fell back 2x" in engine.report() and "gpt2" in engine.report()


def test_mixture_of_experts_keeps_its_balancing_loss(batch) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    stock = MixtralForCausalLM(config).train()
    ours = copy.deepcopy(stock)
    engine = fastpost.accelerate_model(ours)
    expected, actual = stock(**batch), ours(**batch)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    scored = ours(**batch, fused_lm_head=True)
    torch.testing.assert_close(scored.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert engine.packed_forwards == 2
    expected.loss.backward()
    actual.loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-5, rtol=1e-3, msg=name)


class LeakyLlama(LlamaForCausalLM):
    """Mixes neighbouring tokens behind attention's back, as a convolution would."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp.register_forward_hook(
            lambda module, args, output: output + output.roll(1, dims=1)
        )


def test_self_check_refuses_a_model_that_mixes_rows(batch) -> None:
    torch.manual_seed(0)
    model = LeakyLlama(llama().config)
    with pytest.warns(FastpostWarning, match="packing refused.*mixes tokens across sequences"):
        engine = fastpost.accelerate_model(model)
    assert "packing off" in engine.report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**batch, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, stock_logps(model, batch), atol=2e-5, rtol=1e-5)


def test_self_check_refuses_a_head_that_is_not_linear() -> None:
    model = llama()
    stock = model.forward

    def scaled(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="not the linear map"):
        fastpost.accelerate_model(model)
    assert model.forward is scaled


def test_arguments_without_a_packed_form_take_the_models_own_forward(batch) -> None:
    model = llama().train()
    engine = fastpost.accelerate_model(model)
    with pytest.warns(FastpostWarning, match="output_hidden_states"):
        output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.logits is not None
    with pytest.warns(FastpostWarning, match="input_ids are missing"):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        output = model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]
        )
    assert output.logits is not None and sum(engine.fallbacks.values()) == 2


def test_a_mask_with_a_hole_runs_unpacked(batch) -> None:
    model = llama()
    fastpost.accelerate_model(model)
    batch["attention_mask"][0, 3] = 0
    with pytest.warns(FastpostWarning, match="hole"):
        output = model(**batch, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, stock_logps(model, batch), atol=2e-5, rtol=1e-5)


def test_all_rows_masked_is_a_differentiable_zero(batch) -> None:
    model = llama().train()
    fastpost.accelerate_model(model)
    batch["labels"].fill_(-100)
    output = model(**batch, fused_lm_head=True)
    assert float(output.loss) == 0 and not output.log_probs.any()
    output.log_probs.sum().backward()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss) == 0
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
def test_smallest_batches(shape) -> None:
    model = llama().train()
    fastpost.accelerate_model(model)
    ids = torch.ones(shape, dtype=torch.int64)
    output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert output.log_probs.shape == (shape[0], shape[1] - 1)
    assert torch.isfinite(output.loss)


def test_bad_input_is_named(batch) -> None:
    model = llama().train()
    fastpost.accelerate_model(model)
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 101\)"):
        model(
            **batch | {"labels": batch["labels"].masked_fill(batch["labels"] > 0, VOCAB)},
            fused_lm_head=True,
        )
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(**batch | {"labels": batch["labels"][:, :-1]}, fused_lm_head=True)
    with pytest.raises(ValueError, match="the batch is empty"):
        empty = torch.zeros(0, 4, dtype=torch.int64)
        model(input_ids=empty, labels=empty, fused_lm_head=True)
    with pytest.raises(ValueError, match="pass labels or shift_labels"):
        model(input_ids=batch["input_ids"], fused_lm_head=True)


def test_bad_options_are_named() -> None:
    with pytest.raises(TypeError, match="causal language model"):
        fastpost.accelerate_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown outputs"):
        fastpost.accelerate_model(llama(), outputs=("logps",))
    with pytest.raises(ValueError, match="temperature must be positive"):
        fastpost.accelerate_model(llama(), temperature=0.0)
    with pytest.raises(ValueError, match="memory_budget_gb must be positive"):
        fastpost.accelerate_model(llama(), memory_budget_gb=-1)


def test_nan_weights_show_up_in_the_loss(batch) -> None:
    model = llama().train()
    fastpost.accelerate_model(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert torch.isnan(model(**batch).loss)
    assert torch.isnan(model(**batch, fused_lm_head=True).loss)


def test_bf16_stays_close_to_fp32(batch) -> None:
    exact, half = llama(), llama().bfloat16()
    fastpost.accelerate_model(half)
    expected = stock_logps(exact, batch)
    actual = half(**batch, fused_lm_head=True).log_probs
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.15, rtol=0.05)


def test_peft_model_and_its_disabled_adapter(batch) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        llama(),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    engine = fastpost.accelerate_model(model)
    adapted = model(**batch, fused_lm_head=True).log_probs
    with model.disable_adapter():
        base = model(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(base, stock_logps(llama(), batch), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(adapted, base, atol=1e-2)
    model.train()
    model(**batch).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    assert engine.packed_forwards == 3 and not engine.fallbacks


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(batch, use_reentrant) -> None:
    plain, checkpointed = llama().train(), llama().train()
    fastpost.accelerate_model(plain)
    engine = fastpost.accelerate_model(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    plain(**batch).loss.backward()
    checkpointed(**batch).loss.backward()
    for mine, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    assert engine.packed_forwards == 1


def test_autocast_multiplies_in_half_precision(batch) -> None:
    model = llama()
    fastpost.accelerate_model(model)
    exact = model(**batch, fused_lm_head=True).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch, fused_lm_head=True).log_probs
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.15, rtol=0.05)


def test_value_head_reads_the_states_that_predict_the_labels(batch) -> None:
    model = llama().train()
    with pytest.raises(ValueError, match="value_head"):
        fastpost.accelerate_model(model, outputs=("state_values",))
    model.value_head = torch.nn.Linear(32, 1)
    fastpost.accelerate_model(model, outputs=("log_probs", "state_values"))
    output = model(**batch, fused_lm_head=True)
    stock = llama().train()
    stock.value_head = copy.deepcopy(model.value_head)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = stock.model(**inputs).last_hidden_state[:, :-1]
    scored = batch["labels"][:, 1:] != -100
    expected = stock.value_head(hidden)[..., 0] * scored
    torch.testing.assert_close(output.state_values, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape)
    for values, owner in ((output.state_values, model), (expected, stock)):
        (values * weights).sum().backward()
        assert owner.value_head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad,
        stock.model.embed_tokens.weight.grad,
        atol=1e-5,
        rtol=1e-4,
    )


def test_output_is_still_a_mapping(batch) -> None:
    """DDP walks outputs through `values()`; no field may hide a method of the mapping."""
    model = llama()
    fastpost.accelerate_model(model)
    scored = model(**batch, fused_lm_head=True)
    assert [value is not None for value in scored.values()] == [True] * len(scored)
    assert not set(type(scored).__dataclass_fields__) & set(dir(dict))


def test_a_copy_outlives_the_engine(batch) -> None:
    """The attention functions are unwrapped by then, so a plan would be ignored."""
    model = llama()
    engine = fastpost.accelerate_model(model)
    twin = copy.deepcopy(model)
    engine.remove()
    with pytest.warns(FastpostWarning, match="removed"):
        scored = twin(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(scored, stock_logps(llama(), batch), atol=2e-5, rtol=1e-5)


def test_a_model_that_amplifies_rounding_is_packed_all_the_same() -> None:
    """In bf16 two correct runs of it are far apart, and no other row has a part in that."""
    model = llama(num_hidden_layers=32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 60  # attention that picks one token or another
    engine = fastpost.accelerate_model(model.bfloat16())
    distance = float(engine.self_check.split("packed rows ")[1].split()[0])
    assert distance > 0.3 and engine.unpackable_reason is None and not engine.fallbacks
