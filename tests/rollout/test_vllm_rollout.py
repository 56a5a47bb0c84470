"""vLLM's driver as a rollout, with a driver that answers without vLLM."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest

from fastpost.rollout.vllm_rollout import VLLMRollout, require_vllm


class Driver:
    """Answers each prompt with its own tokens reversed; the log-prob of token i is −i."""

    def __init__(self, drops: int = 0, logprobs: bool = True) -> None:
        self.synced = 0
        self.calls: list[dict[str, Any]] = []
        self._drops = drops
        self._logprobs = logprobs

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, **call: Any) -> Any:
        self.calls.append(call)
        answered = call["prompts"][self._drops :]
        completions = [tuple(reversed(ids)) for ids in answered]
        # vLLM lists the sampled token's log-prob first and may list others behind it.
        logprobs = [[[None if t == 7 else -float(t), -99.0] for t in ids] for ids in completions]
        return answered, completions, logprobs if self._logprobs else None, None


def test_samples_and_log_probs_come_in_the_order_of_the_prompts() -> None:
    driver = Driver()
    rollout = VLLMRollout(driver, lambda: 2, lambda: 0)
    found = rollout.generate([[1, 2], [1, 2], [7, 3]])
    assert found.completion_ids == [[2, 1], [2, 1], [3, 7]]
    assert found.logps is not None and found.logps[:2] == [[-2.0, -1.0]] * 2
    assert found.logps[2][0] == -3.0 and math.isnan(found.logps[2][1])
    call = driver.calls[0]
    assert call["num_generations"] == 2 and call["images"] is None


def test_weights_are_sent_once_a_step() -> None:
    driver, step = Driver(), [0]
    rollout = VLLMRollout(driver, lambda: 1, lambda: step[0])
    sent = []
    for step[0] in (0, 0, 1, 3, 3):
        rollout.generate([[1]])
        sent.append(driver.synced)
    assert sent == [1, 1, 2, 3, 3]


def test_a_driver_without_log_probs_is_taken() -> None:
    assert VLLMRollout(Driver(logprobs=False), lambda: 1, lambda: 0).generate([[1]]).logps is None


def test_missing_completions_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="vLLM returned 1 completions for 2 prompts"):
        VLLMRollout(Driver(drops=1), lambda: 1, lambda: 0).generate([[1], [2]])


def test_without_vllm_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastpost\[vllm\]'"):
        require_vllm()
