"""Runs the stages in order: finished ones are skipped, interrupted ones go on.

    output_dir/manifest.json               what ran (`run_facts`), one entry a start
    output_dir/stages/NAME/stage.json      fingerprint of the inputs, digest of what was made
    output_dir/stages/NAME/evaluation.json scores of its model, `start` among them
    output_dir/stages/NAME/log.txt         everything its process said

A stage whose inputs changed is done again; what it had made is set aside under another name.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpost.pipeline.chain import TemplateChain, watch_reference
from fastpost.pipeline.commands import command_of, output_of, work_command, write_json
from fastpost.pipeline.digests import Digests
from fastpost.pipeline.evaluation import Regression, best_so_far, regressions, table
from fastpost.pipeline.recipe import TRAINED_KINDS, Pipeline, RecipeError, Stage
from fastpost.pipeline.run_facts import run_facts
from fastpost.report.reading import RECORD, StageRead, read_training

__all__ = ["Regression", "Run", "StageFailed"]

_SHOWN_LINES = 30
# Kept in the log and not shown: bars of loading and tokenizing, other libraries' deprecations.
_PASSED_OVER = re.compile(r"^\s*$|%\||examples \[|FutureWarning|warnings\.warn|^Failed to load CPU")


class StageFailed(RuntimeError):
    """A stage's process ended with an error; the message ends with what it said last."""


class Run:
    """One run of a pipeline in its folder.

    Args:
        pipeline: what runs; relative paths are those of this process's working folder.
        is_smoke: for the manifest.
        say: takes every line that is shown.

    Attributes:
        folder: the run's folder.
        scores: stage -> score by name, of the stages evaluated so far, in order.
    """

    def __init__(
        self, pipeline: Pipeline, *, is_smoke: bool = False, say: Callable[[str], None] = print
    ) -> None:
        self.pipeline, self.is_smoke, self._say = pipeline, is_smoke, say
        self.folder = Path(pipeline.output_dir).expanduser()
        self.scores: dict[str, dict[str, Any]] = {}
        self._made: dict[str, dict[str, Any]] = {}
        self._lock: int | None = None

    def run(self) -> None:
        """Run what is not done.

        Raises:
            StageFailed: a stage ended with an error.
            Regression: a score fell by more than its tolerance.
            ValueError: template, tokenizer or reference changed on the way; a mistake in the file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._digests = Digests(self.folder / "digests.json")
            self._write_manifest()
            chain = TemplateChain(self.folder)
            chain.begin(self.pipeline.model)
            if self.pipeline.evaluation:
                self._evaluate("start", self.pipeline.model)
            for number, stage in enumerate(self.pipeline.stages, 1):
                self._say(f"stage {number}/{len(self.pipeline.stages)} {stage.name} ({stage.kind})")
                self._take(stage, chain)
            self._digests.save()
        if self.scores:
            self._say(table(self.scores))

    def _take(self, stage: Stage, chain: TemplateChain) -> None:
        folder = self.folder / "stages" / stage.name
        fields = self._resolved(stage.fields)
        if stage.kind != "evaluate":
            output = self._make(stage, fields, folder, chain)
        else:
            output = Path(fields["model"])
        if stage.is_evaluated:
            self._evaluate(stage.name, str(output))

    def _make(
        self, stage: Stage, fields: dict[str, Any], folder: Path, chain: TemplateChain
    ) -> Path:
        """What the stage makes, made now unless it is there."""
        fingerprint, inputs = self._digests.fingerprint(
            stage.kind, stage.fields, lambda name: str(self._made[name]["sha256"])
        )
        record = _read(folder / "stage.json")
        if record and record["fingerprint"] != fingerprint:
            self._set_aside(folder, record)
            record = None
        if record and record["finished"]:
            output = Path(record["output"])
            if output.exists() and self._digests.of(output) == record["sha256"]:
                self._say("  finished before; skipped")
                self._made[stage.name] = record
                if stage.makes_policy:
                    chain.after(stage, output)
                return output
            self._say(f"  {output} is not what the stage had made; it is done again")
            self._set_aside(folder, record)
            record = None
        if record:
            self._say("  interrupted before; goes on")
        folder.mkdir(parents=True, exist_ok=True)
        before = watch_reference(stage, fields, self._digests)
        started = time.time()
        spent = record.get("seconds", 0.0) if record else 0.0
        record = {
            "stage": stage.name, "kind": stage.kind, "method": stage.method,
            "fields": fields, "fingerprint": fingerprint, "inputs": inputs, "reference": before,
            "finished": False, "seconds": spent,
        }  # fmt: skip
        write_json(folder / "stage.json", record)
        gpus = None if self.is_smoke else self.pipeline.gpus
        try:
            self._call(command_of(stage, fields, folder, gpus), folder / "log.txt", stage.name)
        finally:
            record["seconds"] = spent + time.time() - started
            write_json(folder / "stage.json", record)
        output = _chosen(stage, folder)
        _refuse_stopped(stage, output)
        if before and watch_reference(stage, fields, self._digests) != before:
            raise ValueError(
                f"stage {stage.name}: {before['model']}, which it is compared with, changed while "
                "it ran; nothing may write there. Restore it and run again"
            )
        if stage.makes_policy:
            chain.after(stage, output)
        record |= {
            "finished": True, "output": str(output), "sha256": self._digests.of(output),
            "bytes": sum(p.stat().st_size for p in _files(output)),
        }  # fmt: skip
        write_json(folder / "stage.json", record)
        self._digests.save()
        self._made[stage.name] = record
        self._say(f"  done in {record['seconds']:.0f} s: {output}")
        return output

    def _resolved(self, value: Any) -> Any:
        """Fields with paths in the place of references."""
        if isinstance(value, Mapping):
            return {name: self._resolved(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._resolved(part) for part in value]
        if isinstance(value, str) and value.startswith("stage:"):
            return self._made[value.removeprefix("stage:")]["output"]
        return value

    def _evaluate(self, name: str, model: str) -> None:
        """Score a model, once; compare with the best of the stages before.

        Raises:
            Regression: it is worse by more than a tolerance.
        """
        folder = self.folder / "stages" / name
        fingerprint, _ = self._digests.fingerprint(
            "evaluation", {"model": model, "scorers": self.pipeline.evaluation}, str
        )
        path = folder / "evaluation.json"
        found = _read(path)
        if found is None or found["fingerprint"] != fingerprint:
            job = {
                "work": "evaluate",
                "model": model,
                "scorers": self.pipeline.evaluation,
                "compared_with": None
                if name == "start"
                else str(self.folder / "stages/start/evaluation.json"),
                "fingerprint": fingerprint,
                "output": str(path),
            }
            folder.mkdir(parents=True, exist_ok=True)
            self._call(
                work_command(folder / "evaluation", job), folder / "evaluation.txt", f"{name} eval"
            )
            found = _read(path)
            assert found is not None
        scores = found["scores"]
        fallen = regressions(scores, best_so_far(self.scores))
        self.scores[name] = scores
        self._say("  " + ", ".join(f"{key} {score['value']:.3f}" for key, score in scores.items()))
        if fallen:
            raise Regression(f"stage {name}: " + "; ".join(fallen))

    def _call(self, command: list[str], log: Path, label: str) -> None:
        """A process whose lines are shown and kept.

        Raises:
            StageFailed: it ends with an error.
        """
        last: list[str] = []
        assert self._lock is not None
        with open(log, "a", encoding="utf-8") as file:
            file.write("$ " + " ".join(command) + "\n")
            # The lock goes with the process: should this one be killed, no second run begins
            # beside a stage that is still at work.
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(self._lock,),
            ) as process:
                os.pwrite(self._lock, f"{process.pid:<20}".encode(), 0)
                assert process.stdout is not None
                try:
                    for line in process.stdout:
                        file.write(line)
                        file.flush()
                        if not _PASSED_OVER.search(line):
                            last = [*last[-_SHOWN_LINES:], line.rstrip()]
                            self._say(f"  {label} | {line.rstrip()}")
                except BaseException:
                    process.terminate()
                    raise
        if process.returncode:
            raise StageFailed(
                f"stage {label} ended with code {process.returncode}; all it said is in {log}, "
                "the last lines are\n" + "\n".join(last)
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run's folder.

        Raises:
            RecipeError: another run is at work in it.
        """
        self._lock = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                process = os.pread(self._lock, 20, 0).decode().strip()
                raise RecipeError(
                    f"another run is at work in {self.folder} (process {process}); wait for it, or "
                    "end it"
                ) from None
            yield
        finally:
            os.close(self._lock)

    def _set_aside(self, folder: Path, record: Mapping[str, Any]) -> None:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
            number += 1
        folder.rename(aside)
        self._say(f"  its inputs changed; what it made before is in {aside}")

    def _write_manifest(self) -> None:
        path = self.folder / "manifest.json"
        starts = (_read(path) or {}).get("starts", [])
        facts = run_facts(self.pipeline, self.is_smoke)
        write_json(path, {"starts": [*starts, facts]})


def _chosen(stage: Stage, folder: Path) -> Path:
    """The model or rows that a finished stage leaves."""
    result = _read(folder / "loop" / "result.json")
    if result is not None:
        return Path(result["checkpoint"])
    return output_of(stage, folder)


def _refuse_stopped(stage: Stage, output: Path) -> None:
    """A training that its health monitor ended is not a finished one.

    Raises:
        StageFailed: with what was found.
    """
    if stage.kind not in TRAINED_KINDS or not (output / RECORD).is_file():
        return
    found = StageRead(stage.name, stage.kind)
    read_training(output / RECORD, found)
    for finding in found.health:
        if finding["action"] == "stop":
            raise StageFailed(
                f"stage {stage.name} was stopped by its health monitor at step {finding['step']}: "
                f"{finding['illness']}; {finding['figures']}; try: {finding['fix']}"
            )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [p for p in path.rglob("*") if p.is_file() and "checkpoint-" not in str(p)]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
