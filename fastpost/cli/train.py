"""What the training commands share: the fields of a run, its checks, and its end.

`prepare` does everything that can fail cheaply (recipe, fields, data) before a model is loaded;
`run` builds the trainer from that, trains and saves. Only the trainer differs per command.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpost.cli.dataset import check_columns, load_data
from fastpost.cli.field_help import command_help, default_of
from fastpost.cli.recipe import Recipe, UsageError, did_you_mean, read_recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Trainer, TrainingArguments

DTYPES = ("auto", "float32", "bfloat16", "float16")

COMMON_FIELDS = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "eval_strategy",
    "eval_steps",
    "report_to",
    "seed",
)


def _doc(text: str, **default: Any) -> Any:
    return field(metadata={"help": text}, **default)


@dataclass(kw_only=True)
class RunFields:
    """The fields of a run that are not part of the trainer's configuration."""

    model: str = _doc("Model to train: a folder, or an id on the Hugging Face Hub")
    dataset: str = _doc(
        "Training data: a .jsonl, .json, .parquet or .csv file, or a data set's name"
    )
    dataset_split: str = _doc(
        "Split of the training data; 'train[:1000]' takes 1000 rows", default="train"
    )
    eval_dataset: str | None = _doc(
        "Evaluation data, as dataset; needs eval_strategy", default=None
    )
    eval_split: str = _doc("Split of the evaluation data", default="test")
    dtype: str = _doc(f"Type the weights are loaded in: {', '.join(DTYPES)}", default="float32")
    lora_r: int | None = _doc("Train a LoRA adapter of this rank, not all weights", default=None)
    lora_alpha: int | None = _doc(
        "LoRA scale is lora_alpha / lora_r; 2 * lora_r if unset", default=None
    )
    lora_dropout: float = _doc("Dropout on the adapter's input, 0 to 1", default=0.0)
    lora_target_modules: str | list[str] = field(
        default="all-linear", metadata={"help": "Layers that get an adapter"}
    )
    use_dora: bool = _doc("Train the magnitude of each weight row too (DoRA)", default=False)
    load_in_4bit: bool = _doc(
        "Keep the model's weights in 4 bits (NF4) below an adapter (QLoRA)", default=False
    )
    record: bool = _doc(
        "Watch the run's health, and keep its curves for fastpost report", default=False
    )

    def lora_config(self, task_type: str = "CAUSAL_LM") -> LoraConfig | None:
        """The PEFT configuration these fields ask for; None trains all weights."""
        if self.lora_r is None:
            return None
        from peft import LoraConfig  # heavy

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=2 * self.lora_r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            use_dora=self.use_dora,
            task_type=task_type,
        )


@dataclass(frozen=True)
class Command:
    """One training command; `method_fields`: those of its trainer worth showing in the help."""

    name: str
    summary: str
    method_fields: tuple[str, ...]
    run_fields: type[RunFields] = RunFields


@dataclass(frozen=True)
class Job:
    """A checked run: everything its trainer needs."""

    fields: Any  # an instance of the command's run_fields
    config: Any  # the trainer's configuration
    train_data: Dataset
    eval_data: Dataset | None


def prepare(
    command: Command,
    argv: list[str],
    config_class: type[TrainingArguments],
    columns: Sequence[tuple[str, ...]],
) -> Job | None:
    """Reads and checks a run. Returns None when there is nothing to train (help, dry run).

    Args:
        command: the command that was called.
        argv: its arguments.
        config_class: the trainer's configuration dataclass.
        columns: alternatives of columns the data must have; "dataset_text_field" stands for
            the column that field names.

    Raises:
        UsageError: anything wrong with the recipe, the flags, the fields or the data.
    """
    hints = typing.get_type_hints(command.run_fields) | typing.get_type_hints(config_class)
    names = [f.name for f in _fields(command.run_fields) + _fields(config_class)]
    hints = {name: hints[name] for name in names}
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        show_all = "--help-all" in argv or "--help_all" in argv
        groups = _groups(command, config_class, show_all)
        print(command_help(command.name, command.summary, groups, hints, show_all))
        return None
    recipe = read_recipe(argv, hints)
    fields, config = _build(command.run_fields, config_class, recipe)
    columns = [
        tuple(config.dataset_text_field if c == "dataset_text_field" else c for c in needed)
        for needed in columns
    ]
    method = command.name.upper()
    train_data = load_data(fields.dataset, fields.dataset_split, "dataset")
    check_columns(train_data, columns, method, fields.dataset, "dataset")
    eval_data = None
    if fields.eval_dataset is not None:
        eval_data = load_data(fields.eval_dataset, fields.eval_split, "eval_dataset")
        check_columns(eval_data, columns, method, fields.eval_dataset, "eval_dataset")
    if recipe.dry_run:
        if _is_main_process():
            print(_dry_run_text(command, recipe, config, train_data, eval_data))
        return None
    return Job(fields, config, train_data, eval_data)


def run(
    command: Command,
    argv: list[str],
    columns: Sequence[tuple[str, ...]],
    config_class: type[TrainingArguments],
    trainer_class: Any,
    more: Callable[[Job], dict[str, Any]] = lambda job: {},
    task_type: str = "CAUSAL_LM",
) -> int:
    """Prepares, trains and saves; returns the exit code.

    Args:
        command, argv, columns, config_class: see `prepare`.
        trainer_class: built from the checked run.
        more: further arguments of the trainer.
        task_type: PEFT's name for what an adapter is trained for.

    Raises:
        UsageError: see `prepare`.
    """
    job = prepare(command, argv, config_class, columns)
    if job is None:
        return 0
    trainer = trainer_class(
        model=_model(job, task_type),
        args=job.config,
        train_dataset=job.train_data,
        eval_dataset=job.eval_data,
        peft_config=job.fields.lora_config(task_type),
        **more(job),
    )
    if job.fields.record:
        from fastpost.report.record import record_run  # heavy

        record_run(trainer, command.name)
    return train_and_save(trainer, command.name)


def _model(job: Job, task_type: str) -> Any:
    """What the trainer takes as its model: the name, or the model where it is kept in 4 bits."""
    fields, config = job.fields, job.config
    if not fields.load_in_4bit:
        return fields.model
    if task_type != "CAUSAL_LM":
        raise UsageError("load_in_4bit: a reward model is not loaded in 4 bits; leave it out")
    import torch  # heavy

    from fastpost.adapters.load_nf4 import load_nf4

    options = config.model_init_kwargs
    dtype = torch.bfloat16 if options["dtype"] == "auto" else getattr(torch, options["dtype"])
    others = sorted(set(options) - {"dtype"})
    if others:
        raise UsageError(f"model_init_kwargs: load_in_4bit takes dtype only, got {others}")
    config.model_init_kwargs = None
    # FSDP2 shards what has a floating-point dtype
    storage = torch.bfloat16 if config.fsdp else torch.uint8
    return load_nf4(fields.model, dtype=dtype, storage=storage)


def train_and_save(trainer: Trainer, label: str) -> int:
    """Trains with a progress display, saves, prints the engine's report and where the model is."""
    from fastpost.progress import use_progress  # heavy

    use_progress(trainer, label)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if _is_main_process():
        print(trainer.engine.report())
        print(f"Saved to {Path(trainer.args.output_dir).resolve()}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return 0


def _fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _groups(
    command: Command, config_class: type[TrainingArguments], show_all: bool
) -> dict[str, list[dataclasses.Field[Any]]]:
    training = {f.name: f for f in _fields(config_class)}
    peers = [c for c in config_class.__mro__ if not c.__module__.startswith("fastpost.")]
    inherited = {f.name for c in peers if dataclasses.is_dataclass(c) for f in _fields(c)}
    added = {name: f for name, f in training.items() if name not in inherited}
    groups = {"the run": _fields(command.run_fields), "fastpost": list(added.values())}
    if show_all:
        rest = [f for name, f in training.items() if name in inherited]
        return groups | {"training, as in TRL's and transformers' documentation": rest}
    # Methods that are ours alone have all their fields here: each is shown once.
    groups["fastpost"] = [f for name, f in added.items() if name not in command.method_fields]
    groups["method"] = [training[name] for name in command.method_fields]
    groups[f"training, most used of {len(training)}"] = [
        training[name] for name in COMMON_FIELDS if name in training
    ]
    return groups


def _build(
    run_fields: type[RunFields], config_class: type[TrainingArguments], recipe: Recipe
) -> tuple[Any, Any]:
    """The two dataclasses, filled and checked against each other."""
    run_names = {f.name for f in _fields(run_fields)}
    missing = [f.name for f in _fields(run_fields) if default_of(f) is dataclasses.MISSING]
    for name in missing:
        if recipe.values.get(name) is None:
            raise UsageError(f"{name} is missing: write --{name} ... or a line `{name}: ...`")
    fields = run_fields(**{k: v for k, v in recipe.values.items() if k in run_names})
    training = {k: v for k, v in recipe.values.items() if k not in run_names}
    _check_run(fields, recipe)
    init = dict(training.get("model_init_kwargs") or {})
    if "dtype" in init and "dtype" in recipe.given:
        raise UsageError("dtype is given twice: as a field and in model_init_kwargs; keep one")
    training["model_init_kwargs"] = {"dtype": fields.dtype} | init
    try:
        config: Any = config_class(**training)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the training fields do not work together: {error}") from error
    strategy = config.eval_strategy.value
    if (strategy != "no") != (fields.eval_dataset is not None):
        raise UsageError(
            f"eval_dataset is {fields.eval_dataset} but eval_strategy is '{strategy}': "
            "give both (eval_strategy steps or epoch) or neither"
        )
    return fields, config


def _check_run(fields: RunFields, recipe: Recipe) -> None:
    for name in ("model", "ref_model"):
        path = getattr(fields, name, None)
        if path and path.startswith(("/", ".", "~")):
            if not (Path(path).expanduser() / "config.json").is_file():
                raise UsageError(f"{name}: {path} is not a model folder (it has no config.json)")
            setattr(fields, name, str(Path(path).expanduser()))
    if fields.dtype not in DTYPES:
        hint = did_you_mean(fields.dtype, DTYPES)
        raise UsageError(f"dtype: expected {', '.join(DTYPES)}, got {fields.dtype}.{hint}")
    adapter = [f for f in _fields(RunFields) if f.name.startswith(("lora_", "use_dora"))]
    idle = [f.name for f in adapter if getattr(fields, f.name) != default_of(f)]
    if idle and fields.lora_r is None:
        raise UsageError(f"{', '.join(idle)} given without lora_r, the rank that switches LoRA on")
    if fields.load_in_4bit and fields.lora_r is None:
        raise UsageError("load_in_4bit keeps weights that cannot be trained: give lora_r too")
    if fields.lora_r is not None and fields.lora_r < 1:
        raise UsageError(f"lora_r: expected 1 or more, got {fields.lora_r}")
    if not 0 <= fields.lora_dropout < 1:
        raise UsageError(f"lora_dropout: expected 0 <= value < 1, got {fields.lora_dropout}")


def _dry_run_text(
    command: Command, recipe: Recipe, config: Any, train_data: Dataset, eval_data: Dataset | None
) -> str:
    """The resolved fields as a recipe that could be used again; the rest as comments."""
    lines = [f"# fastpost {command.name}: given fields, and where"]
    for name, value in recipe.values.items():
        lines.append(f"{name}: {json.dumps(value)}  # {recipe.given[name]}")
    lines.append(
        f"# resolved defaults of the most used fields; fastpost {command.name} --help-all lists all"
    )
    unset = [f for f in _fields(command.run_fields) if f.name not in recipe.given]
    lines += [f"{f.name}: {json.dumps(default_of(f))}" for f in unset]
    for name in (*command.method_fields, *COMMON_FIELDS):
        if name not in recipe.given and hasattr(config, name):
            lines.append(f"{name}: {json.dumps(getattr(config, name))}")
    for title, data in (("dataset", train_data), ("eval_dataset", eval_data)):
        if data is not None:
            columns = ", ".join(data.column_names)
            lines.append(f"# {title}: {len(data):,} rows, columns: {columns}")
    return "\n".join(lines)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
