"""One run of a loop in its folder: every question asked, stage trained and checkpoint graded once.

    folder/journal.jsonl        what is done (`fastpost.loops.journal`)
    folder/start/               the model the loop was given, if it was given in memory
    folder/<stage>/rows.jsonl   what a stage was trained on
    folder/<stage>/run/         checkpoints of a stage that is being trained
    folder/<stage>/model/       what came out, a whole model that plain transformers loads

A loop is plain code that names its stages. Run again after a kill it takes the same way: what the
journal holds is not done twice, and the first thing it does not hold is where work goes on. A
training that was killed goes on from its last checkpoint (`save_steps` of its fields).
"""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path

from fastpost.chat_model.interface import ChatModel, Conversation
from fastpost.checkpoints import flush, last_complete_checkpoint
from fastpost.data.row_files import json_line, whole_file
from fastpost.data.rows import DataError, Row, read_rows
from fastpost.loops.journal import Journal
from fastpost.reference_cache import reference_digest

__all__ = [
    "Evaluate",
    "Fields",
    "LoopResult",
    "LoopRun",
    "Sampler",
    "prompt_rows",
    "watching",
]

Watch = Callable[[Any, str, Path], None]  # a trainer, its stage, the stage's folder
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)

Sampler = Callable[[str], ChatModel]  # a model folder in
Evaluate = Callable[[str], Mapping[str, float]]  # a model folder in, scores out
Fields = Mapping[str, Any]  # of a trainer's configuration, and `peft_config`


@dataclass(frozen=True)
class LoopResult:
    """What a loop made.

    Attributes:
        checkpoint: the model to use, a folder.
        rows: stage -> file of the rows it was trained on.
        metrics: one entry an iteration, in order, with the names the loop's docstring gives.
    """

    checkpoint: Path
    rows: dict[str, Path]
    metrics: list[dict[str, Any]]


class LoopRun:
    """A run of the loop `name`; a context manager, which holds the folder's journal.

    Args:
        name: of the loop.
        model: a model folder or hub name, or a model in memory, which stays as it is.
        tokenizer: of the model.
        folder: of this run alone.
        data: rows by name, in any form `fastpost.data` reads; None has no part in the run.
        options: what else the outcome depends on, by name; functions count by their names.
        seed: of all that is drawn.
        batch_size: conversations of one call of a chat model or judge, which is what a kill loses.

    Attributes:
        start: the model folder (or hub name) to begin with.
        data: the rows of `data` in memory.

    Raises:
        DataError: data that cannot be read, or a folder of another run.
        ValueError: a model with an adapter, several processes, no data.
    """

    def __init__(
        self,
        name: str,
        model: str | Path | PreTrainedModel,
        tokenizer: Any,
        folder: str | Path,
        *,
        data: Mapping[str, Any],
        options: Mapping[str, Any],
        seed: int,
        batch_size: int,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{name} runs in one process, WORLD_SIZE is {os.environ['WORLD_SIZE']}; start it "
                "without torchrun"
            )
        if isinstance(model, PeftModel):
            raise ValueError(
                f"{name} begins with a whole model, but was given one with an adapter; merge it "
                "first (`fastpost merge`)"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.data = {
            key: list(read_rows(source)) for key, source in data.items() if source is not None
        }
        self.seed = seed
        self.batch_size = batch_size
        self._rows: dict[str, Path] = {}
        about = {
            "loop": name,
            "model": str(model) if isinstance(model, str | Path) else reference_digest(model),
            "data": {key: _digest(rows) for key, rows in self.data.items()},
            "seed": seed,
            "batch_size": batch_size,
            **{key: _plain(value) for key, value in options.items()},
        }
        self.journal = Journal(self.folder, about)
        self.start = str(model if isinstance(model, str | Path) else self._keep_start(model))

    def __enter__(self) -> LoopRun:
        return self

    def __exit__(self, *reason: Any) -> None:
        self.journal.close()

    def _keep_start(self, model: PreTrainedModel) -> Path:
        """The model in memory as a folder, from which every stage can load it anew."""
        folder = self.folder / "start"
        if "start" not in self.journal:
            shutil.rmtree(folder, ignore_errors=True)
            self._save(model, folder)
            self.journal.put("start", True)
        return folder

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        flush(folder)

    def seed_of(self, stage: str) -> int:
        """A seed for one stage, another one for each."""
        return zlib.crc32(f"{self.seed}/{stage}".encode())

    def batched(
        self, stage: str, items: Sequence[Any], call: Callable[[int, Any], Iterable[Any]]
    ) -> list[Any]:
        """`call(batch number, batch)` over all batches, one value an item; each batch once.

        Raises:
            ValueError: a call gave another number of values.
        """
        values: list[Any] = []
        for number, start in enumerate(range(0, len(items), self.batch_size)):
            batch = items[start : start + self.batch_size]

            def make(number: int = number, batch: Any = batch) -> list[Any]:
                made = list(call(number, batch))
                if len(made) != len(batch):
                    raise ValueError(
                        f"stage {stage}: {len(batch)} items were given and {len(made)} values came "
                        "back; return one value an item, None where there is none"
                    )
                return made

            values += self.journal.once(f"{stage}/{number}", make)
        return values

    def ask(
        self, stage: str, chat: Callable[[], ChatModel], conversations: Sequence[Conversation]
    ) -> list[str | None]:
        """Replies to conversations; `chat()` gives the chat model, and is called only if needed."""
        first = self.seed_of(stage)

        def call(number: int, batch: Sequence[Conversation]) -> list[str | None]:
            replies = list(chat()(batch, seed=(first + number) % 2**32))
            for reply in replies:
                if reply is not None and not isinstance(reply, str):
                    raise TypeError(
                        f"stage {stage}: a chat model replied with {type(reply).__name__}, "
                        "expected a string or None"
                    )
            return replies

        return self.batched(stage, conversations, call)

    def write_rows(self, stage: str, rows: Sequence[Row]) -> Path:
        """The rows of a stage as a file."""
        path = self.folder / stage / "rows.jsonl"
        if f"{stage}/trained" not in self.journal or not path.exists():
            with whole_file(path) as file:
                file.writelines(map(json_line, rows))
        self._rows[stage] = path
        return path

    def train(
        self,
        stage: str,
        trainer_class: type[Any],
        config_class: type[Any],
        fields: Fields,
        model: str | Path,
        rows: Sequence[Row],
        *,
        reference: str | Path | None = None,
        **arguments: Any,
    ) -> Path:
        """Train `model` on `rows`, once; the folder of what came out.

        Args:
            fields: of `config_class`, without `output_dir`; `peft_config` goes to the trainer, and
                the adapter is merged when the stage is trained.
            reference: folder of the reference model; None leaves it to the trainer.
            arguments: further ones of `trainer_class`.

        Raises:
            ValueError: no rows, or a field that is the loop's own.
        """
        trained = self.folder / stage / "model"
        if not rows:
            raise ValueError(f"stage {stage} has no rows to train on; see {self.journal.path}")
        self.write_rows(stage, rows)
        if f"{stage}/trained" in self.journal:
            return trained
        fields = dict(fields)
        if "output_dir" in fields:
            raise ValueError(
                f"stage {stage}: output_dir is chosen by the loop, inside its folder; leave it out"
            )
        if fields.get("peft_config") is not None:
            arguments["peft_config"] = fields["peft_config"]
        fields.pop("peft_config", None)
        if reference is not None:
            init = dict(fields.get("model_init_kwargs") or {})
            arguments["ref_model"] = create_model_from_path(str(reference), **init)
        run = self.folder / stage / "run"
        trainer = trainer_class(
            model=str(model),
            args=config_class(output_dir=str(run), **fields),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=copy.deepcopy(self.tokenizer),
            **arguments,
        )
        if (watch := _WATCH.get()) is not None:
            watch(trainer, stage, self.folder / stage)
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(run)[0])
        self._save(_whole_model(trainer), trained)
        self.journal.put(f"{stage}/trained", _last_numbers(trainer.state.log_history))
        shutil.rmtree(run, ignore_errors=True)
        del trainer, arguments
        # A trainer and its callbacks refer to each other; the next stage needs their memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return trained

    def trained(self, stage: str) -> dict[str, float]:
        """The last figures that the trainer of a stage logged."""
        return dict(self.journal[f"{stage}/trained"])

    def measure(self, stage: str, evaluate: Evaluate | None, model: str | Path) -> dict[str, float]:
        """`evaluate(model)`, once; nothing without an `evaluate`."""
        if evaluate is None:
            return {}
        return dict(
            self.journal.once(
                f"{stage}/evaluation",
                lambda: {name: float(value) for name, value in evaluate(str(model)).items()},
            )
        )

    def result(self, checkpoint: str | Path, metrics: Sequence[dict[str, Any]]) -> LoopResult:
        """The loop's result."""
        return LoopResult(Path(checkpoint), dict(self._rows), list(metrics))


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Shows `watch` every trainer of a loop within, before it trains."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def prompt_rows(rows: Sequence[Row], name: str, *columns: str) -> list[Row]:
    """`rows`, each of which must have `prompt` as messages, and `columns`.

    Raises:
        DataError: names the row and what it lacks.
    """
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt")
        if not isinstance(prompt, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in prompt
        ):
            raise DataError(
                f"{name}, row {number}: prompt must be a list of messages "
                f'{{"role": "user", "content": "..."}}, got {str(prompt)[:80]!r}'
            )
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise DataError(
                f"{name}, row {number} has no {' and no '.join(missing)}; it has {sorted(row)}"
            )
    return list(rows)


def _whole_model(trainer: Any) -> PreTrainedModel:
    """The trained model free of engine, accelerate's wrappers and adapter."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    for engine in (trainer.engine, trainer.ref_engine):
        if engine is not None:
            engine.remove()
    model.zero_grad(set_to_none=True)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _last_numbers(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The newest value of every number logged, but those about time and one process's share."""
    found: dict[str, float] = {}
    for entry in log_history:
        found |= {k: float(v) for k, v in entry.items() if isinstance(v, int | float)}
    return {
        k: v for k, v in found.items() if not k.startswith(("train_", "total_flos", "step_time"))
    }


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json_line(row))
    return f"{len(rows)} rows, sha {digest.hexdigest()}"


def _plain(value: Any) -> Any:
    """A value as JSON holds it; functions and objects by name: their text may hold addresses."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "to_dict"):  # PEFT's configurations
        return _plain(value.to_dict())
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return getattr(value, "__qualname__", type(value).__qualname__)
