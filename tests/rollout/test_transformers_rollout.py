"""Sampling with transformers: the tokens of `generate`, and log-probs of a second forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

from fastpost.rollout.interface import Completions, cut_at_end, require_one_each
from fastpost.rollout.transformers_rollout import TransformersRollout
from tests.trainers.conftest import tiny_model

PAD, END = 0, 2
PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_model(48)


def sampling(**changes: Any) -> GenerationConfig:
    settings = {
        "max_new_tokens": 16,
        "do_sample": True,
        "pad_token_id": PAD,
        "eos_token_id": [END, 3],
        "temperature": 0.8,
        "top_k": 0,
        "disable_compile": True,
    }
    return GenerationConfig(**settings | changes)


def second_forward(
    model: LlamaForCausalLM, found: Completions, temperature: float
) -> list[torch.Tensor]:
    """Log-probs of the sampled tokens from the unpadded rows."""
    result = []
    for prompt, completion in zip(PROMPTS, found.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].float() / temperature
        places = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        result.append(places.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return result


def test_samples_as_generate_does(model) -> None:
    rollout = TransformersRollout(lambda: nullcontext(model), sampling(), needs_logps=True)
    width = max(map(len, PROMPTS))
    rows = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in PROMPTS])
    torch.manual_seed(1)
    stock = model.generate(
        input_ids=rows, attention_mask=(rows != PAD).long(), generation_config=sampling()
    )
    torch.manual_seed(1)
    found = rollout.generate(PROMPTS)
    assert [len(ids) for ids in found.completion_ids] != [16] * 4
    for completion, row in zip(found.completion_ids, stock[:, width:].tolist(), strict=True):
        assert completion == row[: len(completion)]
        assert all(token == PAD for token in row[len(completion) :])
        assert len(completion) == 16 or completion[-1] in (END, 3)
        assert not {END, 3} & set(completion[:-1])


@pytest.mark.parametrize("scored_at", [None, 1.0])
@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"temperature": 1.7}], ids=str)
def test_log_probs_are_those_of_a_second_forward(model, changes, scored_at) -> None:
    torch.manual_seed(2)
    rollout = TransformersRollout(
        lambda: nullcontext(model),
        sampling(**changes),
        needs_logps=True,
        pad_to_multiple_of=8,
        logps_temperature=scored_at,
    )
    found = rollout.generate(PROMPTS)
    assert found.logps is not None
    expected = second_forward(model, found, scored_at or changes.get("temperature", 0.8))
    for logps, wanted in zip(found.logps, expected, strict=True):
        torch.testing.assert_close(torch.tensor(logps), wanted, atol=1e-5, rtol=1e-5)


def test_log_probs_are_only_given_when_asked_for(model) -> None:
    rollout = TransformersRollout(lambda: nullcontext(model), sampling())
    assert rollout.generate(PROMPTS).logps is None


def test_a_copy_samples_with_the_weights_of_now(model) -> None:
    lent = []

    @contextmanager
    def lend() -> Iterator[LlamaForCausalLM]:
        lent.append("lent")
        yield model
        lent.append("back")

    rollout = TransformersRollout(lend, sampling(), rollout_dtype="float32", needs_logps=True)
    for _ in range(2):
        torch.manual_seed(4)
        found = rollout.generate(PROMPTS)
        assert found.logps is not None
        wanted = torch.cat(second_forward(model, found, 0.8))
        logps = torch.tensor([value for row in found.logps for value in row])
        torch.testing.assert_close(logps, wanted, atol=1e-5, rtol=1e-5)
        model.lm_head.weight.data.mul_(1.5)
    assert lent == ["lent", "back"] * 2
    assert rollout.copy is not None and rollout.copy.model is not model


def test_continuous_batching_gives_one_completion_for_each_prompt(model) -> None:
    config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    rollout = TransformersRollout(
        lambda: nullcontext(model), sampling(), continuous_batching=config, needs_logps=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rollout.generate(PROMPTS)
    assert found.logps is not None and not config.return_logprobs
    for logps, wanted in zip(found.logps, second_forward(model, found, 0.8), strict=True):
        torch.testing.assert_close(torch.tensor(logps), wanted, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_sampled_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"at the sampling temperature \(0.8\), not at 1.0"):
        TransformersRollout(
            lambda: nullcontext(model),
            sampling(),
            continuous_batching=ContinuousBatchingConfig(),
            logps_temperature=1.0,
        )
    with pytest.raises(ValueError, match="needs pad_token_id and eos_token_id, got None and 2"):
        TransformersRollout(lambda: nullcontext(model), GenerationConfig(eos_token_id=2))


def test_the_end_token_is_kept_and_nothing_after_it() -> None:
    assert cut_at_end([4, 5, 2, 0, 2], [2, 3]) == [4, 5, 2]
    assert cut_at_end([4, 5], [2, 3]) == [4, 5]
    with pytest.raises(RuntimeError, match="continuous batching returned 0 completions for 1"):
        require_one_each([], [[1]], "continuous batching")
