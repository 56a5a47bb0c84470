"""Constitutional AI (Bai 2022, arXiv 2212.08073, sections 3 and 4).

    1  respond ─► critique against a principle ─► revise (repeatedly) ─► SFT on the last revision
    2  two answers of the SFT model ─► a judge prefers one by a principle ─► preference rows ─►
       "dpo"           DPO
       "grpo", "ppo"   a reward model, then RL against it

The principle of each step is drawn anew (`fastpost.loops.constitution`). A prompt is a row
`{"prompt": [messages]}`. Rows say which principles made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastpost.chat_model.interface import Conversation
from fastpost.data.rows import Row
from fastpost.loops.candidates import draw, preference_row, sft_row
from fastpost.loops.constitution import Constitution
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, Sampler, prompt_rows
from fastpost.loops.verdicts import Pair, PairJudge, Verdict, judge_pairs
from fastpost.trainers.dpo import DPOConfig, DPOTrainer
from fastpost.trainers.grpo import GRPOConfig, GRPOTrainer
from fastpost.trainers.ppo import PPOTrainer
from fastpost.trainers.ppo_config import PPOConfig
from fastpost.trainers.reward import RewardConfig, RewardTrainer
from fastpost.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["FEEDBACK", "constitutional"]

FEEDBACK = ("dpo", "grpo", "ppo")
_RL = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}


def constitutional(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    constitution: str | Path | Constitution,
    judge: PairJudge,
    folder: str | Path,
    *,
    sampler: Sampler,
    revisions: int = 1,
    feedback: str = "dpo",
    sft: Fields | None = None,
    dpo: Fields | None = None,
    reward: Fields | None = None,
    rl: Fields | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Run the loop, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        prompts: rows, see above; those the model answers badly.
        constitution: a YAML file, or what was loaded from one.
        judge: a `fastpost.judges` judge or panel, told the principle's `prefer`.
        sampler: makes a chat model of a model folder; its temperature must be above 0.
        revisions: critiques and revisions of each answer.
        feedback: what becomes of the preferences, see above.
        sft, dpo, reward, rl: fields of `SFTConfig`, `DPOConfig`, `RewardConfig`, and `GRPOConfig`
            or `PPOConfig`.
        evaluate: grades a model folder at the start and after both phases.

    Returns:
        The last model; metrics of the start (`iteration` 0), the revisions' SFT (1) and the
        feedback (2): `rows` trained on, `lost` (prompts without a reply), and of the feedback
        `ties` (no preference), `unjudged` (no verdict), `single_judged` (rows that one judge
        decided) and the reward model's figures (`reward_model/...`); the trainer's and
        `evaluate`'s.

    Raises:
        ValueError: an option out of range, a malformed constitution, no rows for a stage.
        DataError: see `LoopRun`.
    """
    _require_options(revisions, feedback, dpo, reward, rl)
    if not isinstance(constitution, Constitution):
        constitution = Constitution.from_yaml(constitution)
    options = {
        "constitution": constitution.as_list(),
        "revisions": revisions,
        "feedback": feedback,
        "sft": sft,
        "dpo": dpo,
        "reward": reward,
        "rl": rl,
    }
    with LoopRun(
        "constitutional",
        model,
        tokenizer,
        folder,
        data={"prompts": prompts},
        options=options,
        seed=seed,
        batch_size=batch_size,
    ) as run:
        asked = [row["prompt"] for row in prompt_rows(run.data["prompts"], "prompts")]
        metrics: list[dict[str, Any]] = [
            {"iteration": 0, **run.measure("0-start", evaluate, run.start)}
        ]
        revised = _revised(run, sampler, constitution, asked, revisions)
        supervised = run.train("1-sft", SFTTrainer, SFTConfig, sft or {}, run.start, revised)
        figures = run.trained("1-sft") | run.measure("1-sft", evaluate, supervised)
        lost = len(asked) - len(revised)
        metrics.append({"iteration": 1, "rows": len(revised), "lost": lost, **figures})
        preferred, counts = _preferred(run, sampler, constitution, judge, asked, supervised)
        if feedback == "dpo":
            stage = "2-dpo"
            last = run.train(stage, DPOTrainer, DPOConfig, dpo or {}, supervised, preferred)
        else:
            graded_by = run.train(
                "2-reward", RewardTrainer, RewardConfig, reward or {}, supervised, preferred
            )
            grader = run.trained("2-reward")
            counts |= {f"reward_model/{name}": value for name, value in grader.items()}
            stage = f"3-{feedback}"
            rows = [{"prompt": prompt} for prompt in asked]
            last = run.train(
                stage, *_RL[feedback], rl or {}, supervised, rows, reward_funcs=[str(graded_by)]
            )
        figures = run.trained(stage) | run.measure(stage, evaluate, last)
        metrics.append({"iteration": 2, "rows": len(preferred), **counts, **figures})
        return run.result(last, metrics)


def _require_options(
    revisions: int, feedback: str, dpo: Fields | None, reward: Fields | None, rl: Fields | None
) -> None:
    if revisions < 1 or feedback not in FEEDBACK:
        raise ValueError(
            f"revisions={revisions}, feedback={feedback!r}; give at least 1, and one of "
            f"{', '.join(FEEDBACK)}"
        )
    unused = {"dpo": {"reward": reward, "rl": rl}}.get(feedback, {"dpo": dpo})
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise ValueError(f"feedback={feedback!r} does not use {', '.join(given)}; leave it out")


def _revised(
    run: LoopRun,
    sampler: Sampler,
    constitution: Constitution,
    prompts: Sequence[Conversation],
    revisions: int,
) -> list[Row]:
    """SFT rows of prompts and their last revision; a prompt with a reply missing has none."""
    chat = cache(lambda: sampler(run.start))
    answers: Mapping[int, str] = _present(
        range(len(prompts)), run.ask("1-sft/respond", chat, prompts)
    )
    used: dict[int, list[str]] = {i: [] for i in answers}
    for revision in range(1, revisions + 1):
        stage = f"1-sft/revision-{revision}"
        drawn = {i: constitution.draw(run.seed, "revise", revision, i) for i in answers}
        talks = {
            i: [*prompts[i], _says("assistant", text), _says("user", drawn[i].critique)]
            for i, text in answers.items()
        }
        critiques = _present(talks, run.ask(f"{stage}/critique", chat, list(talks.values())))
        talks = {
            i: [*talks[i], _says("assistant", text), _says("user", drawn[i].revise)]
            for i, text in critiques.items()
        }
        answers = _present(talks, run.ask(f"{stage}/revise", chat, list(talks.values())))
        for i in answers:
            used[i].append(drawn[i].name)
    return [sft_row(prompts[i], text) | {"principles": used[i]} for i, text in answers.items()]


def _preferred(
    run: LoopRun,
    sampler: Sampler,
    constitution: Constitution,
    judge: PairJudge,
    prompts: Sequence[Conversation],
    model: Path,
) -> tuple[list[Row], dict[str, float]]:
    """Preference rows from two different answers to each prompt, and what was left out."""
    stage = "2-preferences"
    answers = draw(run, f"{stage}/sample", sampler, model, prompts, 2)
    drawn = {
        i: constitution.draw(run.seed, "prefer", i)
        for i, texts in enumerate(answers)
        if len(texts) == 2
    }
    verdicts: dict[int, Verdict] = {}
    for principle in constitution.principles:
        places = [i for i in drawn if drawn[i] == principle]
        ask = partial(_verdicts, judge, principle.prefer)
        pairs = [Pair(prompts[i], *answers[i]) for i in places]
        said = run.batched(f"{stage}/judge/{principle.name}", pairs, ask)
        verdicts |= {i: Verdict(*verdict) for i, verdict in zip(places, said, strict=True)}
    rows = []
    for i, principle in drawn.items():
        value, is_single = verdicts[i]
        if value is None or value == 0.5:
            continue
        chosen, rejected = answers[i] if value > 0.5 else reversed(answers[i])
        provenance = {"principle": principle.name, "single_judged": is_single}
        rows.append(preference_row(prompts[i], chosen, rejected) | provenance)
    counts: dict[str, float] = {
        "lost": len(prompts) - len(drawn),
        "ties": sum(value == 0.5 for value, _ in verdicts.values()),
        "unjudged": sum(value is None for value, _ in verdicts.values()),
        "single_judged": sum(row["single_judged"] for row in rows),
    }
    return rows, counts


def _verdicts(judge: PairJudge, criteria: str, number: int, pairs: Sequence[Pair]) -> list[Verdict]:
    return judge_pairs(judge, criteria, pairs)


def _present(places: Any, replies: Sequence[str | None]) -> dict[int, str]:
    """Place -> reply, where there is one."""
    found = zip(places, replies, strict=True)
    return {i: reply for i, reply in found if reply is not None and reply.strip()}


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
