"""Online DPO with a judge or a reward model (Guo 2024, arXiv 2402.04792).

    each step: two answers a prompt from the policy of now; the one that the judge prefers, or that
    the reward ranks higher, is chosen; DPO's loss (`fastpost.trainers.online_dpo`)

A judge is asked about pairs, a reward about single answers. What a judge or a reward function said
is written down by the content it said it of: a resumed training, which repeats the steps since its
last checkpoint bit for bit, asks nothing again. A prompt is a row `{"prompt": [messages], ...}`
whose other columns reach reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastpost.chat_model.interface import content_digest
from fastpost.loops.candidates import Reward
from fastpost.loops.journal import Journal
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, prompt_rows
from fastpost.loops.verdicts import Pair, PairJudge, judge_pairs
from fastpost.rewards.completion import completion_text
from fastpost.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

__all__ = ["online_judge"]

_JUDGED = "judged/"


def online_judge(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    folder: str | Path,
    *,
    judge: PairJudge | None = None,
    criteria: str | None = None,
    rewards: Reward | str | Sequence[Reward | str] | None = None,
    online_dpo: Fields | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Run the loop, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        prompts: rows, see above.
        judge: a `fastpost.judges` judge or panel, which prefers one of two answers by `criteria`;
            without a verdict a pair counts as a tie,
            of which the answer drawn first is chosen.
        rewards: instead of a judge: functions in TRL's form, or folders of reward models.
        online_dpo: fields of `OnlineDPOConfig`.
        evaluate: grades a model folder before and after.

    Returns:
        The trained model; two entries of metrics, before and after: `iteration`, `evaluate`'s
        figures, and after also the trainer's last ones and `judged`, the number of pairs (answers)
        that were asked about.

    Raises:
        ValueError: not one of judge (with criteria) and rewards.
        DataError: see `LoopRun`.
    """
    if (judge is None) == (rewards is None) or (judge is None) != (criteria is None):
        raise ValueError("give either a judge with its criteria, or rewards")
    options = {
        "judge": judge,
        "criteria": criteria,
        "rewards": rewards,
        "online_dpo": online_dpo,
    }
    with LoopRun(
        "online_judge",
        model,
        tokenizer,
        folder,
        data={"prompts": prompts},
        options=options,
        seed=seed,
        batch_size=batch_size,
    ) as run:
        rows = prompt_rows(run.data["prompts"], "prompts")
        before = {"iteration": 0, **run.measure("0-start", evaluate, run.start)}
        stage = "1-online-dpo"
        functions: list[Any] = []
        if judge is not None and criteria is not None:
            functions = [_JudgedPairs(run.journal, judge, criteria)]
        elif rewards is not None:
            given = [rewards] if callable(rewards) or isinstance(rewards, str) else list(rewards)
            functions = [_Remembered(run.journal, f) if callable(f) else str(f) for f in given]
        trained = run.train(
            stage,
            OnlineDPOTrainer,
            OnlineDPOConfig,
            online_dpo or {},
            run.start,
            rows,
            reward_funcs=functions,
        )
        after = {
            "iteration": 1,
            "judged": run.journal.count(_JUDGED),
            **run.trained(stage),
            **run.measure(stage, evaluate, trained),
        }
        return run.result(trained, [before, after])


class _JudgedPairs:
    """A judge of pairs as a reward of TRL's online DPO, whose answers i and i + B are a pair."""

    __name__ = "judge"

    def __init__(self, journal: Journal, judge: PairJudge, criteria: str) -> None:
        self._journal, self._judge, self._criteria = journal, judge, criteria

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        half = len(completions) // 2
        texts = list(map(completion_text, completions))
        pairs = list(map(Pair, prompts[:half], texts[:half], texts[half:]))

        def ask(places: list[int]) -> list[float | None]:
            asked = [pairs[i] for i in places]
            return [v.value for v in judge_pairs(self._judge, self._criteria, asked)]

        said = _each_once(self._journal, pairs, ask)
        first = [0.5 if verdict is None else float(verdict) for verdict in said]
        return first + [1.0 - verdict for verdict in first]


class _Remembered:
    """A reward function that is asked once about each answer."""

    def __init__(self, journal: Journal, function: Reward) -> None:
        self._journal, self._function = journal, function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | None]:
        state = {k: columns.pop(k) for k in ("trainer_state", "completion_ids") if k in columns}
        names = list(columns)
        items = [
            [self.__name__, *row]
            for row in zip(prompts, completions, *columns.values(), strict=True)
        ]

        def ask(places: list[int]) -> Sequence[float | None]:
            picked = {name: [columns[name][i] for i in places] for name in names}
            if "completion_ids" in state:
                picked["completion_ids"] = [state["completion_ids"][i] for i in places]
            return self._function(
                prompts=[prompts[i] for i in places],
                completions=[completions[i] for i in places],
                **picked,
            )

        return _each_once(self._journal, items, ask)


def _each_once(
    journal: Journal,
    items: Sequence[Any],
    ask: Callable[[list[int]], Sequence[float | None]],
) -> list[float | None]:
    """What is said of every item; `ask` is called with the places of those not asked about yet."""
    keys = [_JUDGED + content_digest(item) for item in items]
    new = {key: i for i, key in enumerate(keys) if key not in journal}
    if new:
        said = list(ask(list(new.values())))
        if len(said) != len(new):
            raise ValueError(
                f"{len(new)} answers were given to a judge or reward and {len(said)} values came "
                "back; return one each, None where there is none"
            )
        for key, value in zip(new, said, strict=True):
            journal.put(key, None if value is None else float(value))
    return [journal[key] for key in keys]
