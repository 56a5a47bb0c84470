"""DPO takes its log-probs from one call of `preference_logratio`; the reference runs first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fastpost
from fastpost import head
from fastpost.losses import ld_seq_logps
from fastpost.preference_scoring import KeptRows, PairScorer, length_desensitised_weights
from fastpost.scoring import Engine, accelerate_model
from fastpost_kernels import HeadRows, PreferenceLogratio
from tests.trainers.conftest import tiny_model

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({"reference": "base"}, {"peft_config": LORA}),
    "frozen": ({"reference": "frozen"}, {}),
    "frozen-beside-adapter": ({"reference": "frozen"}, {"peft_config": LORA}),
    "cached": ({"reference": "cached"}, {}),
}


class Calls:
    """What the kernel was given and what it found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.references: list[HeadRows | Tensor] = []
        self.policies: list[HeadRows] = []
        self.found: list[PreferenceLogratio] = []
        self.shift = 0.0
        original = head.preference_logratio

        def recording(policy: HeadRows, reference: HeadRows | Tensor, *rest: Any, **named: Any):
            found = original(policy, reference, *rest, **named)
            self.policies.append(policy)
            self.references.append(reference)
            self.found.append(found)
            return found._replace(ref_logps=found.ref_logps + self.shift * (found.ref_logps < 0))

        monkeypatch.setattr(head, "preference_logratio", recording)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def train(run_trainer: Any, model: Any, data: Any, kind: str, **config: Any) -> Any:
    fields, options = KINDS[kind]
    settings = {"max_steps": 2} | fields | config
    return run_trainer(
        fastpost.DPOTrainer, fastpost.DPOConfig, model, data, trainer_options=options, **settings
    )


def _kinds(*slow: str) -> list[Any]:
    marks = {name: pytest.mark.slow for name in slow}
    return [pytest.param(name, marks=marks.get(name, ()), id=name) for name in KINDS]


@pytest.mark.parametrize("kind", _kinds("frozen-beside-adapter"))
def test_every_step_is_one_call(
    kind: str, calls: Calls, model, preference_data, run_trainer
) -> None:
    """With the adapter off the two sides share a head; a reference apart comes as sums."""
    trainer = train(run_trainer, model, preference_data, kind, loss_type="sigmoid")
    assert len(calls.found) == 2
    for policy, reference in zip(calls.policies, calls.references, strict=True):
        if kind == "base":
            assert isinstance(reference, HeadRows) and reference.weight is policy.weight
            assert not reference.hidden.requires_grad
        else:
            assert isinstance(reference, Tensor) and reference.shape == (8,)
    for found, log in zip(calls.found, trainer.trace.logs, strict=True):
        rewards = [0.1 * side.mean().item() for side in found.logratios.detach().chunk(2)]
        assert float(log["rewards/chosen"]) == pytest.approx(rewards[0], abs=1e-5)
        assert float(log["rewards/rejected"]) == pytest.approx(rewards[1], abs=1e-5)
        assert float(log["rewards/margins"]) == pytest.approx(
            0.1 * found.margins.mean().item(), abs=1e-5
        )
        loss = -torch.nn.functional.logsigmoid(0.1 * found.margins).mean()
        assert float(log["loss"]) == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.parametrize("kind", _kinds("base", "cached", "frozen-beside-adapter"))
def test_the_loss_depends_on_what_the_call_found(
    kind: str, calls: Calls, model, preference_data, run_trainer
) -> None:
    """Sums of the reference that are off by a constant for one side would change the loss."""
    plain = train(run_trainer, model, preference_data, kind, loss_type="apo_zero", max_steps=1)
    calls.shift = 3.0
    moved = train(run_trainer, model, preference_data, kind, loss_type="apo_zero", max_steps=1)
    assert float(plain.trace.logs[0]["rewards/chosen"]) == pytest.approx(0.0, abs=1e-5)
    assert float(moved.trace.logs[0]["rewards/chosen"]) == pytest.approx(-0.3, abs=1e-5)


@pytest.mark.parametrize("kind", ["base", "frozen"])
def test_the_reference_runs_before_the_policy(
    kind: str, model, preference_data, run_trainer, monkeypatch
) -> None:
    """Its activations are gone before the policy's are kept for the backward."""
    order: list[bool] = []
    original = Engine.run_backbone

    def recording(self: Engine, *args: Any) -> Any:
        order.append(torch.is_grad_enabled())
        return original(self, *args)

    train_once = {"max_steps": 1}
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run_backbone", recording)
        train(run_trainer, model, preference_data, kind, **train_once)
    assert order[-2:] == [False, True]


def test_a_head_saved_with_the_adapter_is_not_shared(
    calls: Calls, preference_data, tokenizer, run_trainer, assert_same_run
) -> None:
    """`modules_to_save` gives policy and reference two heads: both come as rows."""
    model = tiny_model(len(tokenizer), tie_word_embeddings=False)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    runs = [
        run_trainer(
            library.DPOTrainer,
            library.DPOConfig,
            model,
            preference_data,
            trainer_options={"peft_config": lora},
            optim="sgd",
            learning_rate=0.1,
        ).trace
        for library in (fastpost, trl)
    ]
    assert_same_run(*runs)
    reference, policy = calls.references[-1], calls.policies[-1]
    assert isinstance(reference, HeadRows) and policy.weight.requires_grad
    assert not torch.equal(reference.weight, policy.weight)


def _batch(vocab: int) -> dict[str, Tensor]:
    """Two pairs; the answers of a pair begin alike, and one answer is empty."""
    prompt = torch.arange(10, 22)
    answers = [[30, 31, 32, 33], [40], [30, 31, 50], []]
    width = 12 + max(map(len, answers))
    ids = torch.zeros(4, width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, answer in enumerate(answers):
        ids[i, :12] = (prompt + i % 2) % vocab
        ids[i, 12 : 12 + len(answer)] = labels[i, 12 : 12 + len(answer)] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
def test_sums_are_those_of_two_separate_forwards(ld_alpha: float | None) -> None:
    """Answers that begin alike share rows; their sums and gradients are as if they did not."""
    policy, ref = (tiny_model(97, seed=seed) for seed in (0, 1))
    for model in (policy, ref):
        model.get_input_embeddings().weight.requires_grad_(False)  # tied: the head
    engine, ref_engine = accelerate_model(policy), accelerate_model(ref)
    batch = _batch(97)
    found, ref_found = (model(**batch, fused_lm_head=True).log_probs for model in (policy, ref))
    mask = batch["labels"][:, 1:] != -100
    plain = []
    for logps in (found, ref_found.detach()):
        alpha = 1.0 if ld_alpha is None else ld_alpha
        plain.append(torch.cat(ld_seq_logps(*logps.chunk(2), *mask.chunk(2), ld_alpha=alpha)))
    kept = KeptRows(engine.head)
    with torch.no_grad(), ref_engine.scored_by(kept):
        ref(**batch, fused_lm_head=True)
    assert kept.rows is not None and kept.rows.places is not None  # rows are shared
    scorer = PairScorer(engine.head, kept.rows, ld_alpha)
    with pytest.raises(RuntimeError, match="no rows were scored yet"):
        _ = scorer.scores
    with engine.scored_by(scorer):
        policy(**batch, fused_lm_head=True)
    scores = scorer.scores
    assert scores.num_tokens.tolist() == [4, 1, 3, 0]
    torch.testing.assert_close(scores.logps, plain[0])
    torch.testing.assert_close(scores.ref_logps, plain[1])
    weights = [p for p in policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad(scores.margins.square().sum(), weights)
    chosen, rejected = (plain[0] - plain[1]).chunk(2)
    for got, want in zip(
        grads, torch.autograd.grad((chosen - rejected).square().sum(), weights), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
def test_a_head_the_kernel_does_not_take_is_scored_apart(calls: Calls, ld_alpha) -> None:
    """An adapter on the head, or a head spread over processes: the same sums, without the call."""
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    policy = get_peft_model(tiny_model(97, tie_word_embeddings=False), lora)
    engine = accelerate_model(policy)
    batch = _batch(97)
    found = policy(**batch, fused_lm_head=True).log_probs.detach()
    mask = batch["labels"][:, 1:] != -100
    alpha = 1.0 if ld_alpha is None else ld_alpha
    plain = torch.cat(ld_seq_logps(*found.chunk(2), *mask.chunk(2), ld_alpha=alpha))
    sums = torch.randn(4)
    scorer = PairScorer(engine.head, sums, ld_alpha)
    with engine.scored_by(scorer):
        log_probs = policy(**batch, fused_lm_head=True).log_probs
    assert not calls.found and torch.equal(log_probs.detach(), found)
    torch.testing.assert_close(scorer.scores.logps, plain)
    torch.testing.assert_close(scorer.scores.margins, (plain - sums)[:2] - (plain - sums)[2:])
    rows = HeadRows(torch.zeros(1, 64), torch.zeros(97, 64), torch.zeros(1, dtype=torch.int64))
    with engine.scored_by(PairScorer(engine.head, rows)), pytest.raises(ValueError, match="sums"):
        policy(**batch, fused_lm_head=True)


def test_weights_of_tails() -> None:
    """Lengths 3 and 1, 0 and 2: the shorter of each pair is weighed in full."""
    weights = length_desensitised_weights(torch.tensor([3, 0, 1, 2]), 0.5)
    assert weights.tolist() == [1.0, 0.5, 0.5, 1.0, 0.5, 0.5]
