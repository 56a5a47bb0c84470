"""The scorers of an evaluation: each takes a model folder and gives a score and its replies.

    reasoning_gym   problems of a task of reasoning-gym, marked by the task itself
    reward          rows of `dataset`, marked by a reward (`maths`, `code`, FILE.py:FUNCTION)
    judge           share of `dataset`'s prompts where a judge prefers the model's answer to that of
                    the run's first model, asked in both orders, ties as half
    lm_eval         tasks of lm-evaluation-harness, where it is installed

Replies are greedy. The model of the start is the judge's opponent; its own win rate is a half.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost.chat_model.interface import Conversation, Sampling
from fastpost.chat_model.local import LocalChatModel
from fastpost.data.rows import read_rows
from fastpost.judges.judge_file import read_judge
from fastpost.pipeline.evaluation import score

__all__ = ["Evaluated", "evaluate"]

_PROBLEMS, _NEW_TOKENS, _SHOWN = 200, 512, 8
Rewards = Callable[[str | list[str]], list[Any]]


class Evaluated:
    """What an evaluation found: `scores` by name, `samples`, and what was `skipped`, why."""

    def __init__(self) -> None:
        self.scores: dict[str, dict[str, float]] = {}
        self.replies: dict[str, list[str]] = {}
        self.samples: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def evaluate(
    model: str,
    scorers: Sequence[Mapping[str, Any]],
    *,
    rewards: Rewards,
    before: Mapping[str, Any] | None,
) -> Evaluated:
    """Score the model in a folder.

    Args:
        model: folder, also of an adapter, or hub name.
        scorers: of a pipeline's `evaluation`.
        rewards: name of a reward -> functions of TRL's form.
        before: the evaluation of the run's first model; None while that one is evaluated.

    Raises:
        ValueError: a scorer's data lacks what it needs.
    """
    found = Evaluated()
    answerer = _Answerer(model)
    for scorer in scorers:
        name = scorer["name"]
        if scorer["scorer"] == "lm_eval":
            _lm_eval(model, scorer, found)
            continue
        rows = _problems(scorer)
        prompts = [row["prompt"] for row in rows]
        replies = answerer(prompts, scorer.get("max_new_tokens", _NEW_TOKENS))
        if scorer["scorer"] == "reasoning_gym":
            values = [row["score"](reply) for row, reply in zip(rows, replies, strict=True)]
        elif scorer["scorer"] == "reward":
            values = _rewarded(rewards(scorer["reward"]), rows, replies, name)
        else:
            values = _preferred(scorer, prompts, replies, before)
        found.scores[name] = score(values, scorer["tolerance"])
        found.replies[name] = replies
        for prompt, reply, value in islice(zip(prompts, replies, values, strict=False), _SHOWN):
            found.samples.append({"scorer": name, "prompt": prompt, "reply": reply, "score": value})
    return found


class _Answerer:
    """Greedy replies of a model that is loaded when first asked."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._model: Any = None

    def __call__(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        if self._model is None:
            several = torch.cuda.device_count() > 1
            place = {"device_map": "auto"} if several else {}
            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype="auto", **place)
            if torch.cuda.is_available() and not several:
                self._model.to("cuda")
            self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        chat = LocalChatModel(
            self._model.eval(),
            self._tokenizer,
            self._folder,
            sampling=Sampling(temperature=0.0, max_tokens=max_new_tokens),
            batch_size=32,
        )
        return [reply or "" for reply in chat(list(prompts), seed=0)]


def _problems(scorer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with `prompt` as messages; of reasoning-gym also `score`, which marks a reply."""
    count = scorer.get("problems", _PROBLEMS)
    if scorer["scorer"] == "reasoning_gym":
        return _reasoning_problems(scorer["task"], count, scorer.get("seed", 4))
    rows = list(islice(read_rows(scorer["dataset"], scorer.get("split", "test")), count))
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            row["prompt"] = [{"role": "user", "content": prompt}]
        elif not isinstance(prompt, list):
            raise ValueError(
                f"evaluation {scorer['name']}: {scorer['dataset']}, row {number} has no prompt; "
                f"it has {sorted(row)}"
            )
    return rows


def _reasoning_problems(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    from fastpost.demo import tasks  # reasoning-gym is an extra

    if task == "chain_sum":  # with worked solutions, and a side that is never trained on
        entries = tasks.problems(count, seed, held_out=True)
        prompts = [row["prompt"] for row in tasks.sft_rows(count, seed, held_out=True)]
        return [
            {"prompt": prompt, "score": lambda reply, entry=entry: float(tasks.score(reply, entry))}
            for prompt, entry in zip(prompts, entries, strict=True)
        ]
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=count, seed=seed)
    ask = " End with a line 'Answer: ' and the answer alone."

    def marked(entry: Any) -> Callable[[str], float]:
        def mark(reply: str) -> float:
            answer = reply.rpartition("Answer:")[2].strip() or None
            return float(dataset.score_answer(answer, entry))

        return mark

    return [
        {
            "prompt": [{"role": "user", "content": entry["question"] + ask}],
            "score": marked(entry),
        }
        for entry in (dataset[i] for i in range(count))
    ]


def _rewarded(
    functions: Sequence[Any], rows: Sequence[dict[str, Any]], replies: Sequence[str], name: str
) -> list[float]:
    """The mean reward of each row over the functions that speak of it, held to [0, 1]."""
    completions = [[{"role": "assistant", "content": reply}] for reply in replies]
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    marks = []
    for function in functions:
        if not callable(function):
            raise ValueError(f"evaluation {name}: {function} is a model; use a function")
        marks.append(function(prompts=prompts, completions=completions, **columns))
    values = []
    for row in zip(*marks, strict=True):
        spoken = [float(mark) for mark in row if mark is not None]
        if spoken:
            values.append(min(1.0, max(0.0, sum(spoken) / len(spoken))))
    return values


def _preferred(
    scorer: Mapping[str, Any],
    prompts: Sequence[Conversation],
    replies: Sequence[str],
    before: Mapping[str, Any] | None,
) -> list[float]:
    """1, ½ or 0 for each prompt: how far the reply beats the first model's."""
    if before is None:
        return [0.5] * len(replies)
    judge = read_judge(scorer["judge"])
    asked = ["\n".join(turn["content"] for turn in prompt) for prompt in prompts]
    firsts = before["replies"][scorer["name"]]
    values = judge.prefer(scorer["criteria"], asked, list(replies), firsts).values
    return [value for value in values if value is not None]


def _lm_eval(model: str, scorer: Mapping[str, Any], found: Evaluated) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        found.skipped[scorer["name"]] = "not installed: pip install fastpost[lm-eval]"
        return
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": model}, tasks=scorer["tasks"],
        limit=scorer.get("limit"), bootstrap_iters=0,
        device="cuda" if torch.cuda.is_available() else "cpu",
        task_manager=TaskManager(include_path=scorer.get("include_path")),
    )  # fmt: skip
    for task, figures in results["results"].items():
        value = figures.get("exact_match,strict-match", figures.get("acc,none"))
        if value is None:
            found.skipped[task] = f"no accuracy among {sorted(figures)}"
            continue
        samples = results["n-samples"][task]["effective"]
        right = round(value * samples)
        marks = [1.0] * right + [0.0] * (samples - right)
        found.scores[task] = score(marks, scorer["tolerance"])
