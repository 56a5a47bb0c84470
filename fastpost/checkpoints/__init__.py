"""Checkpoints that are whole or absent, and what a run needs beside its weights to go on exactly.

transformers writes `checkpoint-N` file by file: killed in between, it leaves a folder that the next
`resume_from_checkpoint=True` picks. Here a checkpoint is written under another name, flushed to the
disk, and renamed (`atomic`): under its own name it is complete.

- `state_files`: state that transformers does not save.
- `sharded`: weights and optimizer of a sharded model, written by all processes at once.
- `disk_space`: whether the checkpoints of a run fit on the disk, before it starts.
- `export`: a sharded checkpoint as a folder that transformers or PEFT loads.

Nothing is unpickled: transformers itself reads scheduler, scaler, random state and the optimizer of
an unsharded run with `torch.load(weights_only=True)`; all else is JSON and safetensors.
"""

from fastpost.checkpoints.atomic import (
    SAVING,
    flush,
    last_complete_checkpoint,
    publish,
    publish_files,
    recover,
    remove_if_empty,
    rotate,
)
from fastpost.checkpoints.state_files import num_processes, read_state, write_state

__all__ = [
    "SAVING",
    "flush",
    "last_complete_checkpoint",
    "num_processes",
    "publish",
    "publish_files",
    "read_state",
    "recover",
    "remove_if_empty",
    "rotate",
    "write_state",
]
