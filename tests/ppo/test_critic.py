from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastpost.ppo.critic import Critic, ValueHead


def policy(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    return LlamaForCausalLM(config).to(dtype)


def test_value_head_is_zero_and_at_least_fp32() -> None:
    head = ValueHead(32, torch.bfloat16, torch.device("cpu"))
    assert head.weight.dtype == torch.float32
    hidden = torch.randn(5, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden).dtype == torch.float32 and not head(hidden).any()
        torch.nn.init.ones_(head.weight)
        expected = hidden.double().sum(-1, keepdim=True)
        torch.testing.assert_close(head(hidden).double(), expected, atol=1e-5, rtol=0)


def test_an_untrained_head_starts_at_a_level_once() -> None:
    model = policy()
    critic = Critic(model, None)
    assert critic.start_at(-3.5) == -3.5
    assert critic.module(torch.randn(4, 32)).flatten().tolist() == [-3.5] * 4
    assert critic.start_at(2.0) == 0.0 and float(critic.module.bias) == -3.5


def test_the_critic_is_trained_with_the_policy_and_written_apart(tmp_path) -> None:
    model = policy()
    critic = Critic(model, None)
    assert "value_head.weight" in dict(model.named_parameters())
    with critic.taken_off():
        assert "value_head.weight" not in model.state_dict()
    assert "value_head.weight" in model.state_dict()
    torch.nn.init.normal_(critic.module.weight)
    critic.save(tmp_path)
    other = Critic(policy(), None)
    assert other.is_saved_in(tmp_path)
    other.load(tmp_path)
    assert torch.equal(other.module.weight, critic.module.weight)


def test_another_critic_is_not_loaded(tmp_path) -> None:
    critic = Critic(policy(), None)
    with pytest.raises(FileNotFoundError, match=r"value_head\.safetensors is missing"):
        critic.load(tmp_path)
    critic.save(tmp_path)
    critic.module.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="holds 2 parameters of other names or shapes than the 1"):
        critic.load(tmp_path)
