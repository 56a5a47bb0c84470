"""A pipeline's file: stages in the order they run, each with the fields of its own command.

    model: Qwen/Qwen3-32B            # what the first stage begins with
    output_dir: runs/assistant
    gpus: 8xH100-80GB                # for --plan, and processes of a training stage
    evaluation:                      # of the model at the start and after every stage
      - {scorer: reasoning_gym, task: chain_sum, problems: 200, tolerance: 0.03}
    stages:
      - {stage: mix, name: rows, sources: {chat: chat.jsonl, maths: maths.jsonl}}
      - {stage: sft, dataset: stage:rows, learning_rate: 5.0e-6, max_length: 8192}
      - {stage: dpo, dataset: pairs.jsonl, lora_r: 64}
      - {stage: merge}

`stage:NAME` stands for what another stage made: rows or a model. A stage without `model` takes the
model of the last stage before it that made one. All keys but those of `Stage` are the fields of
`fastpost STAGE --config`, unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "DATA_KINDS",
    "KINDS",
    "LOOP_KINDS",
    "TRAINED_KINDS",
    "Pipeline",
    "RecipeError",
    "Stage",
    "references",
    "stages_of",
]

DATA_KINDS = ("decontaminate", "mix")
TRAINED_KINDS = ("sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo", "ppo", "safety")
# The names of `fastpost.loops.LOOPS`, which takes seconds to import.
LOOP_KINDS = (
    "constitutional",
    "iterated",
    "length_control",
    "online_judge",
    "r1",
    "rejection_sampling",
    "spin",
)
KINDS = (*DATA_KINDS, *TRAINED_KINDS, *LOOP_KINDS, "evaluate", "merge", "export")
SCORERS = ("reasoning_gym", "reward", "judge", "lm_eval")

_REFERENCE = "stage:"
_TOP = ("name", "model", "output_dir", "gpus", "evaluation", "stages")
_PLAN = ("rows", "tokens", "prompt_tokens", "prompt")
_MERGES = ("adapter", "mean", "interpolate", "task")


class RecipeError(ValueError):
    """A mistake in a pipeline's file; the message names the place and the way out."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: unique, a folder's name; the kind where the file gives none.
        kind: of KINDS; `stage` in the file.
        fields: of the stage's command; `model` is always there for what needs one.
        plan: for `--plan`: `rows` of the data, mean `tokens` of a row, `prompt_tokens` of a
            sampling method or `prompt`, the share of a row that is prompt.
        is_evaluated: whether the model is evaluated after the stage.
        method: the training command; another than `kind` for safety, which is dpo (or sft).
    """

    name: str
    kind: str
    fields: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)
    is_evaluated: bool = False
    method: str = ""

    @property
    def makes_rows(self) -> bool:
        """Whether the stage makes rows, not a model."""
        return self.kind in DATA_KINDS

    @property
    def makes_policy(self) -> bool:
        """Whether later stages go on from the stage's model."""
        return self.kind not in (*DATA_KINDS, "reward", "evaluate", "export")

    @property
    def makes_adapter(self) -> bool:
        """Whether the model is an adapter that waits to be merged."""
        trained = self.kind in TRAINED_KINDS
        return trained and bool(self.fields.get("lora_r") or self.fields.get("adapter"))


@dataclass(frozen=True)
class Pipeline:
    """A checked file. Attributes as in the file; `evaluation` is a list of scorers."""

    name: str
    model: str
    output_dir: str
    stages: tuple[Stage, ...]
    gpus: str | None = None
    evaluation: tuple[dict[str, Any], ...] = ()

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> Pipeline:
        """The pipeline that a file's mapping describes; `where` names the file in messages.

        Raises:
            RecipeError: the first mistake found.
        """
        _check_known(given, _TOP, where)
        for name in ("model", "output_dir"):
            if not isinstance(given.get(name), str) or not given[name]:
                raise RecipeError(f"{where}: {name}: expected text, got {given.get(name)!r}")
        listed = given.get("stages")
        if not isinstance(listed, list) or not listed:
            raise RecipeError(f"{where}: stages: expected a list of stages, got {listed!r:.60}")
        evaluation = _evaluation(given.get("evaluation") or [], where)
        stages: list[Stage] = []
        current = given["model"]
        for number, entry in enumerate(listed, 1):
            stage = _stage(entry, f"{where}: stage {number}", stages, current, bool(evaluation))
            stages.append(stage)
            if stage.makes_policy:
                current = _REFERENCE + stage.name
        gpus = given.get("gpus")
        if gpus is not None and not isinstance(gpus, str):
            raise RecipeError(f"{where}: gpus: expected text such as 8xH100-80GB, got {gpus!r}")
        name = given.get("name") or "pipeline"
        return cls(str(name), given["model"], given["output_dir"], tuple(stages), gpus, evaluation)


def references(value: Any) -> Iterator[str]:
    """Names of the stages that `value` refers to, at any depth."""
    if isinstance(value, str) and value.startswith(_REFERENCE):
        yield value.removeprefix(_REFERENCE)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from references(part)


def stages_of(pipeline: Pipeline, name: str) -> list[Stage]:
    """The stages whose fields refer to the stage `name`."""
    return [stage for stage in pipeline.stages if name in references(stage.fields)]


def _stage(entry: Any, where: str, before: list[Stage], current: str, evaluated: bool) -> Stage:
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        raise RecipeError(f"{where}: expected a mapping with `stage: KIND`, got {entry!r:.60}")
    fields = dict(entry)
    kind = fields.pop("stage")
    if kind not in KINDS:
        raise RecipeError(f"{where}: there is no stage {kind!r}.{_hint(kind, KINDS)}")
    name = fields.pop("name", kind)
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise RecipeError(f"{where}: name: letters, digits, - and _ alone, got {name!r}")
    if name in (stage.name for stage in before) or name == "start":
        raise RecipeError(
            f"{where}: the name {name!r} is taken; give every stage a `name` of its own"
        )
    where = f"{where} ({name})"
    plan = fields.pop("plan", {})
    if not isinstance(plan, dict):
        raise RecipeError(f"{where}: plan: expected a mapping, got {plan!r}")
    _check_known(plan, _PLAN, f"{where}: plan")
    policy = kind not in (*DATA_KINDS, "reward", "export")
    is_evaluated = fields.pop("evaluate", policy and evaluated)
    if not isinstance(is_evaluated, bool):
        raise RecipeError(f"{where}: evaluate: true or false, got {is_evaluated!r}")
    if is_evaluated and not (policy and evaluated):
        why = "there is no `evaluation`" if policy else f"a {kind} stage makes no model to evaluate"
        raise RecipeError(f"{where}: evaluate: true, but {why}")
    method = kind
    if kind == "safety":
        method = fields.pop("method", "dpo")
        if method not in ("dpo", "sft"):
            raise RecipeError(f"{where}: method: dpo or sft, got {method!r}")
    if "output_dir" in fields or "resume_from_checkpoint" in fields:
        raise RecipeError(
            f"{where}: output_dir and resume_from_checkpoint are the pipeline's own; leave them out"
        )
    if kind not in DATA_KINDS:
        _default_model(kind, fields, before, current, where)
    _check_references(kind, fields, before, where)
    return Stage(name, kind, fields, plan, is_evaluated, method)


def _default_model(
    kind: str, fields: dict[str, Any], before: list[Stage], current: str, where: str
) -> None:
    if kind != "merge":
        fields.setdefault("model", current)
        return
    how = fields.setdefault("how", "adapter")
    if how not in _MERGES:
        raise RecipeError(f"{where}: how: one of {', '.join(_MERGES)}, got {how!r}")
    if how != "adapter":
        return
    adapter = fields.setdefault("adapter", current)
    if "model" not in fields:
        made = [s for s in before if _REFERENCE + s.name == adapter]
        if not made or not made[0].makes_adapter:
            raise RecipeError(
                f"{where}: {adapter} is no stage with an adapter (lora_r); name `adapter`, and the "
                "`model` it was trained on, or leave the stage out"
            )
        fields["model"] = made[0].fields["model"]


def _check_references(kind: str, fields: dict[str, Any], before: list[Stage], where: str) -> None:
    known = {stage.name: stage for stage in before}
    for name in references(fields):
        if name not in known:
            hint = _hint(name, known) or " Only stages above can be named."
            raise RecipeError(f"{where}: stage:{name} is no stage before this one.{hint}")
    for key, wants_rows in (
        ("model", False),
        ("ref_model", False),
        ("dataset", True),
        ("eval_dataset", True),
        ("train", True),
    ):
        for name in references(fields.get(key)):
            if known[name].makes_rows != wants_rows:
                made = "rows" if known[name].makes_rows else "a model"
                raise RecipeError(f"{where}: {key}: stage:{name} makes {made}")
            needs_whole = kind in (*TRAINED_KINDS, *LOOP_KINDS, "merge", "export")
            if known[name].makes_adapter and needs_whole:
                raise RecipeError(
                    f"{where}: {key}: stage:{name} makes an adapter; put `- {{stage: merge}}` "
                    "after it, which makes it a whole model"
                )


def _evaluation(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(given, list):
        raise RecipeError(f"{where}: evaluation: expected a list of scorers, got {given!r:.60}")
    names = set()
    for number, scorer in enumerate(given, 1):
        place = f"{where}: evaluation {number}"
        if not isinstance(scorer, dict) or scorer.get("scorer") not in SCORERS:
            raise RecipeError(
                f"{place}: expected a mapping with scorer: one of {', '.join(SCORERS)}; "
                f"got {scorer!r:.80}"
            )
        tolerance = scorer.get("tolerance")
        if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or tolerance < 0:
            raise RecipeError(
                f"{place}: tolerance: how far the score may fall before the run stops, a number "
                f"from 0 on, got {tolerance!r}"
            )
        needed, allowed = _SCORER_FIELDS[scorer["scorer"]]
        _check_known(scorer, ("scorer", "name", "tolerance", *needed, *allowed), place)
        for key in needed:
            if key not in scorer:
                raise RecipeError(f"{place}: {key} is missing")
        name = scorer.get("name", scorer.get("task", scorer["scorer"]))
        if name in names:
            raise RecipeError(f"{place}: the name {name!r} is taken; give a `name`")
        names.add(name)
    return tuple({"name": s.get("name", s.get("task", s["scorer"])), **s} for s in given)


_SCORER_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reasoning_gym": (("task",), ("problems", "seed", "max_new_tokens")),
    "reward": (("reward", "dataset"), ("split", "problems", "max_new_tokens")),
    "judge": (("judge", "dataset", "criteria"), ("split", "problems", "max_new_tokens")),
    "lm_eval": (("tasks",), ("limit", "include_path")),
}


def _check_known(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            hint = _hint(name, known) or f" Known: {', '.join(known)}."
            raise RecipeError(f"{where}: unknown {name!r}.{hint}")


def _hint(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=2)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
