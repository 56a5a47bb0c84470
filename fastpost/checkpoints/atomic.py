"""Folders that are whole under their names, or absent.

    _saving/checkpoint-N ─► fsync every file ─► rename to checkpoint-N ─► fsync the folder

The folder is on a disk that all processes share, or each node saves its own (`save_on_each_node`).
A name that begins with "_" is neither resumed from, nor rotated, nor uploaded by transformers.
`recover` clears what a killed process left there, and puts back a checkpoint that was being
replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

__all__ = [
    "SAVING",
    "flush",
    "last_complete_checkpoint",
    "publish",
    "publish_files",
    "recover",
    "remove_if_empty",
    "rotate",
]

SAVING = "_saving"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_REPLACED = "replaced"
_DELETED = "deleted"
# The last file transformers writes, and the one its just-in-time saving removes last.
_LAST_WRITTEN, _UNFINISHED = "trainer_state.json", "checkpoint-is-incomplete.txt"
# Weights of a whole model; an index and shards of an older save beside them would be read first.
_MODEL_WEIGHTS = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")


def recover(run_folder: str | Path) -> list[str]:
    """Clear what a killed process left half-written in a run's folder.

    Returns:
        One line for each thing removed or put back.
    """
    saving = Path(run_folder) / SAVING
    if not saving.is_dir():
        return []
    found = []
    for old in sorted((saving / _REPLACED).glob("checkpoint-*")):
        if not (Path(run_folder) / old.name).exists():
            os.rename(old, Path(run_folder) / old.name)
            found.append(f"put back {old.name}, which was being replaced")
    found += [f"removed the unfinished {half.name}" for half in sorted(saving.glob("checkpoint-*"))]
    shutil.rmtree(saving)
    return found


def publish(staged: str | Path, final: str | Path) -> None:
    """Flush a finished folder to the disk and give it its name, replacing what has the name.

    Args:
        staged: the finished folder, in `SAVING` of the folder that `final` is in.
        final: its name.
    """
    staged, final = Path(staged), Path(final)
    flush(staged)
    replaced = staged.parent / _REPLACED / final.name
    if final.exists():
        # No rename replaces a folder with files in it. Between these two, `recover` undoes.
        shutil.rmtree(replaced.parent, ignore_errors=True)
        replaced.parent.mkdir()
        os.rename(final, replaced)
    os.rename(staged, final)
    _fsync(final.parent)
    shutil.rmtree(replaced.parent, ignore_errors=True)


def publish_files(staged: str | Path, folder: str | Path) -> None:
    """Flush the files of a finished folder and move them into `folder`, one rename each.

    Weights go first and the files that point to them last. Whole-model weights that an earlier save
    left and this one did not write are removed: a loader would prefer some of them.
    """
    staged, folder = Path(staged), Path(folder)
    flush(staged)
    files = sorted(
        (file.relative_to(staged) for file in staged.rglob("*") if file.is_file()),
        key=lambda name: (name.suffix != ".safetensors", str(name)),
    )
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, folder / name)
    written = {str(name) for name in files}
    if any(_MODEL_WEIGHTS.match(name) for name in written):
        for file in folder.iterdir():
            if _MODEL_WEIGHTS.match(file.name) and file.name not in written:
                file.unlink()
    _fsync(folder)
    shutil.rmtree(staged)


def remove_if_empty(folder: str | Path) -> None:
    """Remove a folder if it is there and holds nothing."""
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


def flush(folder: str | Path) -> None:
    """Have every file of a folder on the disk."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        _fsync(path)
    _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(run_folder: str | Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the newest and the best stay.

    A checkpoint loses its name before its files, so that none is ever half-deleted.
    """
    if limit is None or limit <= 0:
        return
    found = sort_checkpoints(str(run_folder), use_mtime=True, best_model_checkpoint=best)
    kept = {Path(found[-1])} if found else set()
    if best is not None:
        kept.add(Path(best))
    deletable = [Path(path) for path in found if Path(path) not in kept]
    for path in deletable[: max(0, len(found) - limit)]:
        doomed = Path(run_folder) / SAVING / _DELETED
        doomed.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(doomed / path.name, ignore_errors=True)
        os.rename(path, doomed / path.name)
        shutil.rmtree(doomed)


def last_complete_checkpoint(run_folder: str | Path) -> tuple[str | None, list[str]]:
    """The newest checkpoint that was written to its end, and names of newer ones that were not.

    Checkpoints of other trainers are written under their own names, so they can be half there.
    """
    unfinished: list[str] = []
    for step, path in sorted(_numbered(run_folder), reverse=True):
        if (path / _LAST_WRITTEN).is_file() and not (path / _UNFINISHED).exists():
            return str(path), unfinished
        unfinished.append(f"checkpoint-{step}")
    return None, unfinished


def _numbered(run_folder: str | Path) -> Iterator[tuple[int, Path]]:
    if not Path(run_folder).is_dir():
        return
    for path in Path(run_folder).iterdir():
        match = _CHECKPOINT.match(path.name)
        if match and path.is_dir():
            yield int(match[1]), path
