"""Length under control: three ways to keep what is learnt from becoming what is longer.

    "normalised"   DPO on log-ratios per token (`fastpost.losses.dpo_norm`; Lambert 2024)
    "penalised"    LD-DPO: tokens beyond the shorter answer of a pair weigh `ld_alpha` < 1
                   (`fastpost.losses.ld_dpo`; Liu 2024, arXiv 2409.06411)
    "reward"       GRPO on R(y) − per_token · max(0, |y| − target_tokens)
                   (`fastpost.rewards.length`)

The first two take preference rows, the third prompts and rewards. Reported are the length bias of
the preference rows, and the lengths of the model's answers to `probes` before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpost.data.rows import DataError, Row
from fastpost.loops.candidates import Reward, answer, draw
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, Sampler, prompt_rows
from fastpost.rewards.length import length_budget_reward
from fastpost.trainers.dpo import DPOConfig, DPOTrainer
from fastpost.trainers.grpo import GRPOConfig, GRPOTrainer

__all__ = ["WAYS", "length_bias", "length_control"]

WAYS = ("normalised", "penalised", "reward")
_BETA_NORMALISED = 5.0  # a mean over tokens is smaller than a sum; the paper's


def length_control(
    model: Any,
    tokenizer: Any,
    rows: Any,
    probes: Any,
    folder: str | Path,
    *,
    way: str,
    sampler: Sampler,
    ld_alpha: float | None = None,
    rewards: Reward | Sequence[Reward] | None = None,
    target_tokens: int | None = None,
    per_token: float | None = None,
    training: Fields | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Train with length under control, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        rows: preference rows (`prompt`, `chosen`, `rejected`); prompts for "reward".
        probes: held-out prompts that are answered before and after.
        way: one of `WAYS`.
        sampler: makes a chat model of a model folder.
        ld_alpha: of "penalised", in [0, 1): 1 would be plain DPO.
        rewards, target_tokens, per_token: of "reward": what else is rewarded, the length up to
            which an answer costs nothing, and what each further token costs.
        training: fields of `DPOConfig` or `GRPOConfig`.
        evaluate: grades a model folder before and after.

    Returns:
        The trained model; two entries of metrics, before and after: `iteration`, `mean_tokens` and
        `max_tokens` of the answers to the probes (0 of an empty one), `evaluate`'s figures; the
        first holds `length_bias` of preference rows, the second the trainer's figures.

    Raises:
        ValueError: options that belong to another way, are missing or out of range.
        DataError: see `LoopRun`.
    """
    _require_options(
        way,
        {
            "ld_alpha": ld_alpha,
            "rewards": rewards,
            "target_tokens": target_tokens,
            "per_token": per_token,
        },
    )
    fields = dict(training or {})
    if way == "reward":
        assert rewards is not None and target_tokens is not None and per_token is not None
        functions = [rewards] if callable(rewards) else list(rewards)
        functions.append(length_budget_reward(target_tokens, per_token))
    else:
        fields = _dpo_fields(way, fields, ld_alpha)
    options = {
        "way": way,
        "rewards": rewards,
        "target_tokens": target_tokens,
        "per_token": per_token,
        "training": fields,
    }
    with LoopRun(
        "length_control",
        model,
        tokenizer,
        folder,
        data={"rows": rows, "probes": probes},
        options=options,
        seed=seed,
        batch_size=batch_size,
    ) as run:
        asked = [row["prompt"] for row in prompt_rows(run.data["probes"], "probes")]

        def lengths(stage: str, checkpoint: str | Path) -> dict[str, float]:
            answers = draw(run, f"{stage}/probe", sampler, checkpoint, asked, 1)
            counts = [_tokens(tokenizer, texts[0]) if texts else 0 for texts in answers]
            found = {"mean_tokens": sum(counts) / len(counts), "max_tokens": max(counts)}
            return found | run.measure(stage, evaluate, checkpoint)

        before: dict[str, Any] = {"iteration": 0, **lengths("0-start", run.start)}
        if way == "reward":
            data = prompt_rows(run.data["rows"], "rows")
            trained = run.train(
                "1-grpo", GRPOTrainer, GRPOConfig, fields, run.start, data, reward_funcs=functions
            )
            stage = "1-grpo"
        else:
            data = prompt_rows(run.data["rows"], "rows", "chosen", "rejected")
            before["length_bias"] = length_bias(data, tokenizer)
            trained = run.train("1-dpo", DPOTrainer, DPOConfig, fields, run.start, data)
            stage = "1-dpo"
        after = {"iteration": 1, **lengths(stage, trained), **run.trained(stage)}
        return run.result(trained, [before, after])


def length_bias(rows: Sequence[Row], tokenizer: Any) -> dict[str, float]:
    """How much longer the chosen answers of preference rows are.

    Returns:
        `chosen_tokens` and `rejected_tokens`, means; `chosen_longer`, the share of pairs of
        different length in which the chosen answer is the longer one (0.5 where there is no such
        pair): far from 0.5, length alone tells the sides apart.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError("no preference rows; give at least one")
    pairs = [[_tokens(tokenizer, answer(row, s)) for s in ("chosen", "rejected")] for row in rows]
    different = [(chosen, rejected) for chosen, rejected in pairs if chosen != rejected]
    longer = sum(chosen > rejected for chosen, rejected in different)
    return {
        "chosen_tokens": sum(chosen for chosen, _ in pairs) / len(pairs),
        "rejected_tokens": sum(rejected for _, rejected in pairs) / len(pairs),
        "chosen_longer": longer / len(different) if different else 0.5,
    }


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


_BELONGING = {
    "normalised": (),
    "penalised": ("ld_alpha",),
    "reward": ("rewards", "target_tokens", "per_token"),
}


def _require_options(way: str, given: dict[str, Any]) -> None:
    if way not in WAYS:
        raise ValueError(f"way is {way!r}; choose from {', '.join(WAYS)}")
    missing = [name for name in _BELONGING[way] if given[name] is None]
    foreign = [
        name for name, value in given.items() if value is not None and name not in _BELONGING[way]
    ]
    if missing or foreign:
        raise ValueError(
            f"way={way!r} takes {', '.join(_BELONGING[way]) or 'no further option'}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; of another way: {', '.join(foreign)}" if foreign else "")
        )
    if way == "penalised" and not 0 <= given["ld_alpha"] < 1:
        raise ValueError(f"ld_alpha is {given['ld_alpha']}; give 0 to below 1")


def _dpo_fields(way: str, fields: dict[str, Any], ld_alpha: float | None) -> dict[str, Any]:
    own = {"loss_type": ["sigmoid_norm"]} if way == "normalised" else {"ld_alpha": ld_alpha}
    for name in own:
        if name in fields:
            raise ValueError(f"training.{name} is set, but way={way!r} sets it; leave it out")
    return ({"beta": _BETA_NORMALISED} if way == "normalised" else {}) | fields | own
