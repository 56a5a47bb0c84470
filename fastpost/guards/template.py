"""The tokenizer and chat template a model was trained with go with it.

A model tuned under one template and used, or tuned further, under another sees prompts it has never
seen: nothing fails, it only answers worse. So every saved model carries a fingerprint of its
tokenizer, and a trainer that starts from such a folder compares.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

FILE_NAME = "fastpost_template.json"
# Raised when the meaning of a field changes; older files are then read no further.
SCHEMA = 1


def fingerprint(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer (or a processor's) decides which ids a conversation becomes; JSON-ready.

    Keys: `schema`; `chat_template` (text, dict of named texts, or None) and its
    `chat_template_sha256`; `special_tokens` (role -> [text, id]); `added_tokens` (id -> text);
    `vocab_size` and `vocab_sha256`, over all (text, id) pairs in order of id.
    """
    template = tokenizer.chat_template
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return {
        "schema": SCHEMA,
        "chat_template": template,
        "chat_template_sha256": _sha256(template),
        "special_tokens": {
            role: [text, tokenizer.convert_tokens_to_ids(text)]
            for role, text in sorted(tokenizer.special_tokens_map.items())
            if isinstance(text, str)
        },
        "added_tokens": {
            str(token_id): token.content
            for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        },
        "vocab_size": len(vocab),
        "vocab_sha256": _sha256(vocab),
    }


def _sha256(value: Any) -> str:
    """Hash of a text as it is, of anything else as JSON in one canonical form."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(value.encode()).hexdigest()


def save_fingerprint(folder: str | os.PathLike[str], tokenizer: Any) -> Path:
    """Write the fingerprint beside the model, whole or not at all.

    Returns:
        The file written, `fastpost_template.json` in `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(fingerprint(tokenizer), indent=2, ensure_ascii=False) + "\n"
    handle, building = tempfile.mkstemp(prefix=f".{FILE_NAME}-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(building, 0o644)  # mkstemp makes files only their owner can read
        os.replace(building, folder / FILE_NAME)
    except BaseException:
        Path(building).unlink(missing_ok=True)
        raise
    return folder / FILE_NAME


def check_fingerprint(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer or template other than the one the model was saved with.

    Args:
        model: a folder, or a model whose `config._name_or_path` names one. A folder without a
            fingerprint, a hub name and a model made in memory have nothing to compare.
        tokenizer: the tokenizer (or processor) that training will use, after every change that the
            trainer's arguments make to it.

    Raises:
        ValueError: shows what differs and what to do.
    """
    path = _folder(model)
    if tokenizer is None or path is None or not (path / FILE_NAME).is_file():
        return
    file = path / FILE_NAME
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        schema = saved["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a fingerprint ({error}); restore or delete it") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{file} has schema {schema}, this version reads {SCHEMA}; delete the file to train "
            "without the check, or use the version that wrote it"
        )
    differences = _differences(saved, fingerprint(tokenizer))
    if differences:
        raise ValueError(
            f"the model in {path} was trained with another tokenizer or chat template than the "
            "one given:\n" + "\n".join(differences) + "\n"
            f"Load the model's own with AutoTokenizer.from_pretrained({str(path)!r}), without "
            "chat_template_path or eos_token in the arguments; if the change is meant, delete "
            f"{file}"
        )


def _folder(model: Any) -> Path | None:
    if isinstance(model, str | os.PathLike):
        return Path(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if name else None


def _differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    found = []
    if saved["chat_template"] != given["chat_template"]:
        found.append("chat template:")
        found += difflib.unified_diff(
            _lines(saved["chat_template"]),
            _lines(given["chat_template"]),
            "model's",
            "given",
            lineterm="",
        )
    for field in ("special_tokens", "added_tokens"):
        for key in sorted(saved[field].keys() | given[field].keys()):
            old, new = saved[field].get(key), given[field].get(key)
            if old != new:
                name = field.removesuffix("s").replace("_", " ")
                found.append(f"{name} {key}: the model's is {old}, the given one {new}")
    if saved["vocab_sha256"] != given["vocab_sha256"]:
        found.append(
            f"vocabulary: the model's has {saved['vocab_size']} tokens "
            f"(sha256 {saved['vocab_sha256'][:12]}), the given one {given['vocab_size']} "
            f"({given['vocab_sha256'][:12]})"
        )
    return found


def _lines(template: str | dict[str, str] | None) -> list[str]:
    """The template's lines for a diff, its newlines shown: white space decides the tokens."""
    if template is None:
        return ["(none)"]
    if isinstance(template, dict):
        return [
            line for name in sorted(template) for line in [f"[{name}]", *_lines(template[name])]
        ]
    return [repr(line)[1:-1] for line in template.splitlines(keepends=True)]


class TemplateFingerprint(TrainerCallback):
    """Saves the fingerprint with every checkpoint; for trainers that do not do so themselves."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokenizer = kwargs.get("processing_class")
        if tokenizer is not None and state.is_world_process_zero:
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_fingerprint(Path(args.output_dir) / checkpoint, tokenizer)


__all__ = [
    "FILE_NAME",
    "TemplateFingerprint",
    "check_fingerprint",
    "fingerprint",
    "save_fingerprint",
]
