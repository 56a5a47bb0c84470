"""Memory and cost of every training stage, predicted by `fastpost.planning` before the first runs.

The reverse of `fastpost.planning.recipe`: from a training command's fields to a plan's request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastpost.pipeline.recipe import LOOP_KINDS, TRAINED_KINDS, Pipeline, Stage
from fastpost.planning.planner import Plan, plan
from fastpost.planning.request import NOT_PLANNED, Adapter, Request, parse_gpus

__all__ = ["StagePlan", "plan_stages", "request_of", "text_of", "training_tokens"]

GIB = 2**30
# What the trainers take where a recipe says nothing (transformers and TRL 1.x).
_DEFAULTS = {
    "max_length": 1024,
    "max_completion_length": 256,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "bf16": True,
    "dtype": "float32",
    "gradient_checkpointing": True,
}
# Trainings inside a loop, by the name of their fields.
_LOOP_METHODS = {
    "sft": "sft", "second_sft": "sft", "dpo": "dpo", "grpo": "grpo", "second_grpo": "grpo",
    "reward": "reward",
}  # fmt: skip


@dataclass(frozen=True)
class StagePlan:
    """The plan of one training of a stage, or why there is none.

    Attributes:
        name: of the stage, and of the training inside a loop.
        plan: what was found.
        reason: why there is no plan.
    """

    name: str
    plan: Plan | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        if self.plan is None:
            return {"name": self.name, "reason": self.reason}
        return {"name": self.name, **self.plan.as_dict()}


def plan_stages(pipeline: Pipeline) -> list[StagePlan]:
    """A plan for each training, in order; equal requests are traced once.

    Raises:
        ValueError: the pipeline names no GPUs, or a configuration cannot be planned as it is given.
    """
    if pipeline.gpus is None:
        raise ValueError("gpus is missing: name what is planned for, such as 8xH100-80GB")
    done: dict[tuple[Request, float | None], Plan] = {}
    plans = []
    for stage, name, method, fields in _trainings(pipeline):
        if method in NOT_PLANNED:
            plans.append(StagePlan(name, reason=NOT_PLANNED[method]))
            continue
        try:
            request = request_of(pipeline, stage, method, fields)
            key = request, training_tokens(request, stage, fields)
            if key not in done:
                done[key] = plan(request, train_tokens=key[1], suggest=True)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from error
        plans.append(StagePlan(name, done[key]))
    return plans


def _trainings(pipeline: Pipeline) -> Iterator[tuple[Stage, str, str, Mapping[str, Any]]]:
    for stage in pipeline.stages:
        if stage.kind in TRAINED_KINDS:
            yield stage, stage.name, stage.method, stage.fields
        elif stage.kind in LOOP_KINDS:
            for name, method in _LOOP_METHODS.items():
                if isinstance(stage.fields.get(name), Mapping):
                    yield stage, f"{stage.name}.{name}", method, stage.fields[name]


def request_of(pipeline: Pipeline, stage: Stage, method: str, fields: Mapping[str, Any]) -> Request:
    """The request that plans a training.

    Raises:
        ValueError: options the planner has no counterpart of.
    """

    def get(name: str) -> Any:
        return fields.get(name, _DEFAULTS.get(name))

    count, gpu = parse_gpus(pipeline.gpus or "1xH100-80GB")
    if method == "cpo" and fields.get("loss_type") == "simpo":
        method = "simpo"
    samples = method in ("grpo", "rloo")
    seq, prompt = get("max_length"), stage.plan.get("prompt", 0.5)
    if samples:
        prompt_tokens = stage.plan.get("prompt_tokens", 1024)
        seq = prompt_tokens + get("max_completion_length")
        prompt = (prompt_tokens + 0.5) / seq  # int(seq * prompt) is prompt_tokens, rounding apart
    rows = get("per_device_train_batch_size")
    pairs = 2 if method in ("dpo", "orpo", "cpo", "simpo", "reward") else 1
    offload = (fields.get("activation_checkpointing_kwargs") or {}).get("offload", False)
    adapter = _adapter(fields)
    if fields.get("model", "").startswith("stage:") or stage.kind in LOOP_KINDS:
        model = pipeline.model
    else:
        model = fields.get("model", pipeline.model)
    return Request(
        model=model,
        method=method,
        gpu=gpu,
        num_gpus=count,
        seq=seq,
        rows=rows,
        prompt=prompt,
        group=get("num_generations"),
        tokens_per_step=get("gradient_accumulation_steps") * count * seq * rows * pairs,
        adapter=adapter,
        optimizer=_optimizer(fields),
        precision=_precision(get("dtype"), get("bf16"), adapter is not None),
        checkpointing=get("gradient_checkpointing"),
        memory_budget_gb=fields.get("memory_budget_gb"),
        beta=fields.get("beta") if samples else None,
        rollout_dtype=fields.get("rollout_dtype") if samples else None,
        offload=offload,
        optimizer_in_backward=fields.get("optimizer_in_backward", False),
        mlp_tile_tokens=fields.get("mlp_tile_tokens"),
    )


def training_tokens(request: Request, stage: Stage, fields: Mapping[str, Any]) -> float | None:
    """Tokens of the whole training: of `max_steps`, else of `plan.rows` and `plan.tokens`."""
    steps = fields.get("max_steps", -1)
    if steps > 0:
        return float(steps * (request.tokens_per_step or 0))
    if "rows" not in stage.plan:
        return None
    epochs = fields.get("num_train_epochs", _DEFAULTS["num_train_epochs"])
    each = stage.plan.get("tokens", request.seq) * (2 if request.is_pairs else 1)
    return float(stage.plan["rows"] * epochs * each)


def _adapter(fields: Mapping[str, Any]) -> Adapter | None:
    if fields.get("adapter") == "best":
        return Adapter("dora", 32)
    if not fields.get("lora_r"):
        return None
    kind = "dora" if fields.get("use_dora") else "lora"
    if fields.get("load_in_4bit"):
        if kind == "dora":
            raise ValueError("use_dora over 4-bit weights has no plan; plan lora_r alone")
        kind = "qlora"
    return Adapter(kind, fields["lora_r"])


def _optimizer(fields: Mapping[str, Any]) -> str:
    if fields.get("optimizer") == "adamw_8bit":
        return "adamw_8bit"
    named = fields.get("optim", "adamw_torch_fused")
    if not named.startswith("adamw_torch"):
        raise ValueError(f"optim {named!r} has no plan; it knows adamw_torch and adamw_8bit")
    return "adamw"


def _precision(dtype: str, bf16: bool, has_adapter: bool) -> str:
    if dtype == "float32" and not bf16:
        return "fp32"
    if dtype == "bfloat16" and (has_adapter or not bf16):
        return "mixed" if bf16 else "bf16"
    if dtype == "float32" and not has_adapter:
        return "mixed"
    raise ValueError(
        f"dtype {dtype} with bf16 {bf16} has no plan: give float32 and true (weights in fp32), "
        "bfloat16 and false (no others), float32 and false, or for an adapter bfloat16 and true"
    )


def text_of(plans: list[StagePlan]) -> str:
    """A line for each training, and what all of it takes."""
    lines = [f"{'stage':24}{'peak GiB':>10}{'headroom':>10}{'s/step':>9}{'hours':>9}{'$':>10}"]
    hours = dollars = 0.0
    for found in plans:
        if found.plan is None:
            lines.append(f"{found.name:24}not planned: {found.reason}")
            continue
        times = asdict(found.plan.predicted)
        request = found.plan.traced.request
        row = (
            f"{found.name:24}{found.plan.peak_bytes / GIB:10.1f}"
            f"{found.plan.headroom_bytes / GIB:10.1f}{times['step']:9.1f}"
        )
        if times["gpu_hours"] is not None:
            hours += times["gpu_hours"] / request.num_gpus
            dollars += times["dollars"]
            row += f"{times['gpu_hours'] / request.num_gpus:9.1f}{times['dollars']:10,.0f}"
        lines.append(row + ("" if found.plan.fits else "  DOES NOT FIT"))
        lines += [f"    would fit with {words}" for words, _ in found.plan.changes]
    lines.append(
        f"in all, of the stages whose length is known: {hours:,.1f} hours, ${dollars:,.0f}; "
        "memory is traced, times are predictions; evaluations and data are not in it"
    )
    return "\n".join(lines)
