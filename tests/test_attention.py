"""Packed attention under transformers: equal to each row on its own, for every supported model.

The proof of exactness of the whole design: a forest of rows that share prefixes, run once through
the backbone with its unique tokens, gives each row the hidden states, and the parameters the
gradients, that the untouched model gives when it sees every row separately.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpost import attention

# One prompt with an answer and a shared half-answer that ends in two ways; and a row alone.
#          prompt       answer 1      half-answer    its two endings              row alone
SEGMENTS = [[0, 6, 20], [6, 11, 11], [11, 14, 20], [14, 17, 17], [17, 20, 20], [20, 27, 27]]
ROWS = [
    [*range(6), *range(6, 11)],
    [*range(6), *range(11, 17)],
    [*range(6), *range(11, 14), *range(17, 20)],
    [*range(20, 27)],
]
NUM_TOKENS = 27
WINDOW = 4
TOLERANCE = 1e-5  # fp32, relative to the largest entry

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
BOTH_LAYER_TYPES = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
SPECIFIC = {
    "cohere2": BOTH_LAYER_TYPES,
    "deepseek_v3": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    "gemma2": {**BOTH_LAYER_TYPES, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**BOTH_LAYER_TYPES, "query_pre_attn_scalar": 16},
    "glm4": {},
    "gpt_oss": {**BOTH_LAYER_TYPES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"attention_multiplier": 0.3},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": BOTH_LAYER_TYPES,
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {**BOTH_LAYER_TYPES, "use_sliding_window": True},
    "qwen3": {**BOTH_LAYER_TYPES, "use_sliding_window": True},
    "qwen3_moe": {**MOE, "use_sliding_window": True, "sliding_window": WINDOW},
    "smollm3": {**BOTH_LAYER_TYPES, "use_sliding_window": True},
}


def tiny_model(
    model_type: str, auto_class: type = AutoModel, implementation: str | None = None
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | SPECIFIC[model_type])
    model = auto_class.from_config(config, attn_implementation=implementation)
    with torch.no_grad():  # away from the ones, zeros and tiny values of the initialisation
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def unique_tokens() -> tuple[Tensor, Tensor]:
    """Token ids [N] and path positions [N] of the forest."""
    input_ids = torch.randint(3, 97, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    position_ids = torch.empty(NUM_TOKENS, dtype=torch.int64)
    for row in ROWS:
        position_ids[row] = torch.arange(len(row))
    return input_ids, position_ids


def run_packed(model: nn.Module) -> Tensor:
    """Hidden states [N, H] of the unique tokens."""
    input_ids, position_ids = unique_tokens()
    return model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=attention.dummy_mask(torch.float32, "cpu"),
        use_cache=False,
        prefix_plan=SimpleNamespace(segments=torch.tensor(SEGMENTS)),
    ).last_hidden_state[0]


def weighted_sum(rows_hidden: list[Tensor]) -> Tensor:
    """A scalar in which every entry of every row counts differently."""
    generator = torch.Generator().manual_seed(2)
    return sum((torch.randn(h.shape, generator=generator) * h).sum() for h in rows_hidden)


def rows_and_gradients(
    model: nn.Module, rows_hidden: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    weighted_sum(rows_hidden).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [h.detach() for h in rows_hidden], grads


def separate_rows(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    input_ids, _ = unique_tokens()
    hidden = [model(input_ids=input_ids[row][None], use_cache=False)[0][0] for row in ROWS]
    return rows_and_gradients(model, hidden)


def packed_rows(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    hidden = run_packed(model)
    return rows_and_gradients(model, [hidden[row] for row in ROWS])


def assert_same(actual: Tensor, expected: Tensor, name: str) -> None:
    error = (actual - expected).abs().max().item()
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e}"


def assert_packed_equals_separate(
    packed: tuple[list[Tensor], dict[str, Tensor]], separate: tuple[list[Tensor], dict[str, Tensor]]
) -> None:
    for index, (actual, expected) in enumerate(zip(packed[0], separate[0], strict=True)):
        assert_same(actual, expected, f"hidden states of row {index}")
    assert packed[1].keys() == separate[1].keys()
    for name, expected in separate[1].items():
        assert_same(packed[1][name], expected, f"gradient of {name}")


@pytest.fixture
def attached():
    """Attaches models for one test and checks that nothing of it stays."""
    before = dict(ALL_ATTENTION_FUNCTIONS)
    models: list[nn.Module] = []

    def attach(model: nn.Module) -> nn.Module:
        attention.attach(model)
        models.append(model)
        return model

    yield attach
    for model in models:
        attention.detach(model)
    after = dict(ALL_ATTENTION_FUNCTIONS)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("model_type", sorted(attention.SUPPORTED))
def test_every_row_of_a_forest_equals_the_row_alone(model_type, attached):
    model = tiny_model(model_type)
    separate = separate_rows(model)
    assert_packed_equals_separate(packed_rows(attached(model)), separate)


def test_a_wrong_forest_is_caught(attached, monkeypatch):
    """Sabotage: answer 1 grafted onto the half-answer's subtree must not pass."""
    model = tiny_model("llama")
    separate = separate_rows(model)
    wrong = [[0, 6, 20], [6, 11, 20], [11, 14, 20], [14, 17, 17], [17, 20, 20], [20, 27, 27]]
    monkeypatch.setattr(f"{__name__}.SEGMENTS", wrong)
    with pytest.raises(AssertionError, match="hidden states of row 1"):
        assert_packed_equals_separate(packed_rows(attached(model)), separate)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "qwen2"])
def test_each_layer_sees_its_own_window(model_type, attached):
    """The forest's paths are longer than the window, so the sliding layer must differ from full."""
    model = attached(tiny_model(model_type))
    sliding = run_packed(model)
    for layer in model.layers:
        layer.self_attn.sliding_window = None
    assert (run_packed(model) - sliding).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_runs_under_any_configured_implementation(implementation, attached):
    reference = tiny_model("qwen3")
    separate = separate_rows(reference)
    model = attached(tiny_model("qwen3", implementation=implementation))
    assert_packed_equals_separate(packed_rows(model), separate)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_gradient_checkpointing_recomputes_the_packed_attention(
    model_type, use_reentrant, attached
):
    model = tiny_model(model_type)
    separate = separate_rows(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_packed_equals_separate(packed_rows(attached(model)), separate)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_generate_is_unchanged_while_attached(model_type, attached):
    model = tiny_model(model_type, AutoModelForCausalLM).eval()
    prompts = {
        "input_ids": torch.tensor([[0, 0, 5, 9, 30], [7, 8, 9, 10, 11]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    before = model.generate(**prompts, **options)
    after = attached(model).generate(**prompts, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_padded_training_forward_is_unchanged_while_attached(attached):
    for model_type in ("llama", "gpt_oss"):
        model = tiny_model(model_type)
        inputs = {
            "input_ids": torch.tensor([[5, 9, 30, 0], [7, 8, 9, 10]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        }
        before = model(**inputs).last_hidden_state
        assert torch.equal(attached(model)(**inputs).last_hidden_state, before)


def test_uninstall_restores_the_same_function_objects():
    attention_before = dict(ALL_ATTENTION_FUNCTIONS)
    masks_before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    attention.install()
    attention.install()
    attention.uninstall()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not attention_before["sdpa"]
    attention.uninstall()
    assert list(attention_before.items()) == list(ALL_ATTENTION_FUNCTIONS.items())
    assert list(masks_before.items()) == list(ALL_MASK_ATTENTION_FUNCTIONS.items())
    with pytest.raises(RuntimeError, match="without a matching install"):
        attention.uninstall()


def test_models_that_share_a_config_attach_and_detach_independently():
    model = tiny_model("gpt_oss")
    other = AutoModel.from_config(model.config)
    assert other.config is model.config
    attention.attach(model)
    attention.attach(other)
    attention.detach(other)
    assert model.config._attn_implementation == attention.EAGER_NAME
    run_packed(model)
    attention.detach(model)
    assert model.config._attn_implementation == "eager"


def test_a_saved_config_does_not_name_our_implementation(attached, tmp_path):
    model = attached(tiny_model("gpt_oss"))
    model.config.save_pretrained(tmp_path)
    assert "fastpost" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("model_type", ["gemma2", "qwen2", "mistral"])
def test_the_dummy_mask_reaches_attention_as_it_is(model_type, attached):
    """No mask of N x N entries is built, for full and for sliding layers."""
    model = attached(tiny_model(model_type))
    seen = []
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"].numel()),
            with_kwargs=True,
        )
    run_packed(model)
    assert seen == [1, 1]


def test_autocast_reaches_the_packed_attention(attached):
    model = attached(tiny_model("qwen3"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run_packed(model)
    full = run_packed(model)
    error = (low - full).norm() / full.norm()
    assert 0 < error < 0.05


def test_attention_dropout_is_refused():
    model = tiny_model("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        attention.attach(model)


def test_dropout_at_call_time_is_refused(attached):
    model = attached(tiny_model("llama"))
    model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout must be 0"):
        run_packed(model)


def test_several_rows_are_refused(attached):
    model = attached(tiny_model("llama"))
    with pytest.raises(ValueError, match="one row"):
        model(
            input_ids=torch.ones(2, 3, dtype=torch.int64),
            attention_mask=attention.dummy_mask(torch.float32, "cpu"),
            prefix_plan=SimpleNamespace(segments=torch.tensor([[0, 3, 3]])),
        )


@pytest.mark.parametrize(
    ("model_type", "change", "reason"),
    [
        ("llama", {"model_type": "bert"}, "not among the verified"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("llama", {"is_causal": False}, "bidirectional"),
        ("llama", {"_attn_implementation_internal": "paged|sdpa"}, "for generation"),
    ],
    ids=["type", "layers", "gemma3", "not-causal", "paged"],
)
def test_unsupported_reason_names_the_obstacle(model_type, change, reason):
    model = tiny_model(model_type)
    assert attention.unsupported_reason(model) is None
    for name, value in change.items():
        object.__setattr__(model.config, name, value)
    assert reason in attention.unsupported_reason(model)
