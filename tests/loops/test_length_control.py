"""Length control: what each way trains with, the length-bias report, and kills."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpost.loops.length_control import length_bias, length_control
from fastpost.trainers.dpo import DPOTrainer
from fastpost.trainers.grpo import GRPOTrainer
from tests.loops.conftest import TRAINING, Calls, user
from tests.trainers.methods import letter_sum

PAIRS = [{"prompt": user(f"name {i}"), "chosen": "ab" * i, "rejected": "abcd"} for i in range(1, 5)]
PROMPTS = [{"prompt": user(f"name {i}")} for i in range(4)]
PROBES = [{"prompt": user("name 9")}, {"prompt": user("name 10")}, {"prompt": user("none")}]
GROUP = TRAINING | {"num_generations": 2, "max_completion_length": 8}


def reply(model: str, conversation: list, seed: int) -> str | None:
    """Answers of the start are of 6 and 7 letters; those of a trained model one letter shorter."""
    text = conversation[-1]["content"]
    return None if text == "none" else text[: None if model == "start" else -1]


def run_length_control(model, tokenizer, folder, way, rows, calls=None, **options):
    return length_control(
        model,
        tokenizer,
        rows,
        PROBES,
        folder,
        way=way,
        sampler=(calls or Calls()).sampler(reply),
        **options,
    )


def messages(pair: dict) -> dict:
    return pair | {
        side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")
    }


@pytest.mark.parametrize(
    ("way", "options", "fields"),
    [
        ("normalised", {}, {"loss_type": ["sigmoid_norm"], "beta": 5.0, "ld_alpha": None}),
        (
            "penalised",
            {"ld_alpha": 0.25},
            {"loss_type": ["sigmoid"], "beta": 0.1, "ld_alpha": 0.25},
        ),
    ],
)
def test_dpo_ways_set_their_loss_and_report_lengths(
    model, tokenizer, tmp_path, monkeypatch, way, options, fields
) -> None:
    seen = []
    train = DPOTrainer.train

    def watched(self, *args, **kwargs):
        seen.append({name: getattr(self.args, name) for name in fields})
        return train(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "train", watched)
    rows = list(map(messages, PAIRS))
    result = run_length_control(model, tokenizer, tmp_path, way, rows, training=TRAINING, **options)
    assert seen == [fields]
    before, after = result.metrics
    # letters are tokens; the probe without an answer counts 0
    assert (before["mean_tokens"], before["max_tokens"]) == (13 / 3, 7)
    assert (after["mean_tokens"], after["max_tokens"]) == (11 / 3, 6)
    assert before["length_bias"] == {
        "chosen_tokens": 5.0,
        "rejected_tokens": 4.0,
        "chosen_longer": 2 / 3,
    }
    assert "rewards/margins" in after


@pytest.mark.parametrize(
    ("way", "options", "training"),
    [
        ("normalised", {}, {"beta": 2.0}),
        ("penalised", {"ld_alpha": 0.0}, {}),
        ("penalised", {"ld_alpha": 0.5}, {}),
    ],
)
def test_the_loss_is_the_equation_of_the_way(
    model, tokenizer, tmp_path, way, options, training
) -> None:
    """The second step's loss, from the weights after the first, against plain torch."""
    whole = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    fields = TRAINING | whole | training
    rows = list(map(messages, PAIRS))
    one, two = (
        run_length_control(
            model,
            tokenizer,
            tmp_path / str(steps),
            way,
            rows,
            training=fields | {"max_steps": steps},
            **options,
        )
        for steps in (1, 2)
    )
    policy = AutoModelForCausalLM.from_pretrained(one.checkpoint)
    losses = []
    for row in PAIRS:
        sides = [
            logratios(policy, model, tokenizer, row["prompt"], row[s])
            for s in ("chosen", "rejected")
        ]
        if way == "normalised":
            values = [side.mean() for side in sides]
        else:
            shared = min(map(len, sides))
            values = [s[:shared].sum() + options["ld_alpha"] * s[shared:].sum() for s in sides]
        beta = training.get("beta", 0.1)
        losses.append(-torch.nn.functional.logsigmoid(beta * (values[0] - values[1])))
    plain = torch.stack(losses).mean().item()
    assert abs(plain - math.log(2)) > 5e-3
    assert two.metrics[1]["loss"] == pytest.approx(plain, abs=2e-4)


def logratios(policy, reference, tokenizer, prompt, text) -> torch.Tensor:
    """Log-ratio of each token of an answer and of its end, in float64."""
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = [*prompt, {"role": "assistant", "content": text}]
    ids = torch.tensor([tokenizer.apply_chat_template(whole, return_dict=False)])
    with torch.no_grad():
        logps = [
            m(input_ids=ids).logits.double().log_softmax(-1)[0, :-1] for m in (policy, reference)
        ]
    at = ids[0, 1:, None]
    return (logps[0].gather(1, at) - logps[1].gather(1, at))[len(start) - 1 :, 0]


def test_the_reward_is_less_what_exceeds_the_target(
    model, tokenizer, tmp_path, monkeypatch
) -> None:
    rewards = []
    train = GRPOTrainer.train

    def watched(self, *args, **kwargs):
        rewards.append(self.reward_funcs)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "train", watched)
    result = run_length_control(
        model,
        tokenizer,
        tmp_path,
        "reward",
        PROMPTS,
        rewards=letter_sum,
        target_tokens=3,
        per_token=0.5,
        training=GROUP,
    )
    ((ours, length),) = rewards
    assert ours is letter_sum
    assert length([None] * 2, ["", ""], completion_ids=[[7] * 3, [7] * 5]) == [0.0, -1.0]
    assert "rewards/length_budget_reward/mean" in result.metrics[1]


def test_pairs_of_one_length_show_no_bias(tokenizer) -> None:
    rows = [{"chosen": "ab", "rejected": "cd"}]
    assert length_bias(rows, tokenizer)["chosen_longer"] == 0.5


@pytest.mark.slow
def test_a_kill_at_any_point_costs_nothing(model, tokenizer, killed_everywhere) -> None:
    def loop(calls: Calls, folder):
        return run_length_control(
            model,
            tokenizer,
            folder,
            "normalised",
            list(map(messages, PAIRS)),
            calls,
            training=TRAINING,
            evaluate=calls.function(lambda folder: {"score": 0.5}, "evaluate"),
            batch_size=2,
        )

    killed_everywhere(loop)


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        ("shorter", {}, "choose from normalised, penalised, reward"),
        ("penalised", {}, "missing: ld_alpha"),
        ("penalised", {"ld_alpha": 1.0}, "give 0 to below 1"),
        ("normalised", {"ld_alpha": 0.5}, "of another way: ld_alpha"),
        ("reward", {"rewards": letter_sum, "target_tokens": 3}, "missing: per_token"),
        ("normalised", {"training": {"loss_type": "ipo"}}, "leave it out"),
    ],
)
def test_options_of_another_way_are_refused(
    model, tokenizer, tmp_path, way, options, message
) -> None:
    with pytest.raises(ValueError, match=message):
        run_length_control(model, tokenizer, tmp_path, way, PAIRS, **options)
