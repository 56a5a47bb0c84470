"""Process reward model: is each reasoning step right? (Lightman 2023, arXiv 2305.20050.)

    loss = −1/N Σ_steps [y log σ(z) + (1 − y) log(1 − σ(z))]

over all N steps of the accumulated batch and ranks; z is the logit at the step's last token, y its
label: true or false, or the share of continuations that came out right (Wang 2024, "Math-Shepherd",
arXiv 2312.08935, eq. 4). Beneath it every batch is packed, equal beginnings are computed once and
nothing behind the last step. Data, one row:

    {"prompt": [{"role": "user", "content": "What is 2 + 3 * 4?"}],
     "completions": ["3 * 4 = 12", "2 + 12 = 15"], "labels": [true, false]}

Rows of one problem share their beginnings where they meet in a batch: put them next to each other
and set `train_sampling_strategy="sequential"`. Scores are read with `fastpost.process_reward`.

Refused: rows without steps or with a blank one, labels that do not match the steps or lie outside
0 to 1, a model with another number of labels than one or that is no decoder, an adapter that would
leave the head random on reload, `memory_budget_gb` (there is no language-model head), DeepSpeed.
Reported: steps that `max_length` cuts off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastpost.adapters.preset import preset_argument
from fastpost.guards.classifier import refuse_head_budget, refuse_unsaved_head
from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.pooling import accelerate_pooled
from fastpost.process_reward import DEFAULT_SEPARATOR, encode_steps
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer, logger

# Marks tokens that end no step; transformers counts the others for `num_items_in_batch`.
_NO_STEP = -100.0


@dataclass
class PRMConfig(EngineConfig, TrainingArguments):
    """`transformers.TrainingArguments`, the fields of the engine, and how steps are read.

    Attributes:
        max_length: tokens kept of a row; steps that end behind them are cut off. None keeps all.
        step_separator: put behind each step; its last token carries the score.
        train_on_last_step_only: score the outcome alone in training; evaluation scores every step.
        disable_dropout: set every dropout of the model to 0.
        dataset_num_proc: processes that tokenise.
    """

    learning_rate: float = field(
        default=1e-5, metadata={"help": "The initial learning rate for AdamW."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens kept of a row. None keeps all."}
    )
    step_separator: str = field(
        default=DEFAULT_SEPARATOR,
        metadata={"help": "Put behind each step; its last token carries the score."},
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Train on the label of the last step alone."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the model to 0."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the data."}
    )


class StepReport(NamedTuple):
    """What of a data set is trained on.

    Attributes:
        rows: kept.
        steps: labelled steps in them.
        truncated_steps: labelled steps that `max_length` cut off.
        dropped_rows: rows without a labelled step left.
        mean_label: of the labelled steps kept; a model that says so of every step is no better.
    """

    rows: int
    steps: int
    truncated_steps: int
    dropped_rows: int
    mean_label: float


class PRMTrainer(EngineTrainer, Trainer):
    """Trains a token classifier of one label on labelled steps.

    Takes the parameters TRL's trainer of this name took; `model` may be the folder or name of a
    language model, which is loaded in fp32 with a new head.

    Attributes:
        step_reports: data set name -> what of it is trained on.

    Raises:
        TypeError: a data set that is not a `datasets.Dataset` or a dictionary of them.
        ValueError: what the module's docstring says is refused.
    """

    def __init__(
        self,
        model: Any,
        args: PRMConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        model_init: Callable[[], Any] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Tensor] | None = None,
        peft_config: Any = None,
    ) -> None:
        args = as_config(args, PRMConfig)
        preset = preset_argument(args, {"peft_config": peft_config}, "TOKEN_CLS")
        peft_config = preset.get("peft_config", peft_config)
        refuse_unsupported(args)
        refuse_head_budget(args)
        if train_dataset is None:
            raise ValueError(
                "train_dataset is missing; expected rows of prompt, completions, labels"
            )
        if model_init is not None:
            raise ValueError("model_init is not supported: the engine is built on one model")
        model, tokenizer = _load(model, processing_class, args.seed)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.step_separator = args.step_separator
        model = _prepare_model(model, args, peft_config)
        self._tokenizer = tokenizer
        self.step_reports: dict[str, StepReport] = {}
        self._metrics: dict[str, dict[str, list[float]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        if isinstance(eval_dataset, dict):
            prepared: Any = {k: self._prepare(v, args, k, False) for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            prepared = self._prepare(eval_dataset, args, "eval", False)
        else:
            prepared = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or StepCollator(tokenizer.pad_token_id),
            train_dataset=self._prepare(train_dataset, args, "train", True),
            eval_dataset=prepared,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Passes the number of steps in the accumulated batch to `compute_loss`.
        self.model_accepts_loss_kwargs = True
        engine = accelerate_pooled(self.model, prefix_sharing=args.prefix_sharing)
        if engine.unpoolable_reason is not None:
            engine.remove()
            raise ValueError(
                f"this model cannot score steps: {engine.unpoolable_reason}. Use the token "
                "classifier of a decoder such as Llama, Qwen, Mistral or Gemma"
            )
        self._take_engines([engine])

    def _prepare(self, dataset: Any, args: PRMConfig, name: str, is_train: bool) -> Dataset:
        """Tokenise, cut at `max_length`, drop rows without a labelled step, and report."""
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"the {name} data must be a datasets.Dataset, got {type(dataset).__name__}; "
                "steps are counted before training, so load a stream in full"
            )
        require_rows(dataset, f"the {name} data")
        columns = column_names(dataset)
        require_columns(columns, [["prompt", "completions", "labels"]], "a process reward model")
        last_only = is_train and args.train_on_last_step_only
        tokenizer, separator, max_length = self._tokenizer, args.step_separator, args.max_length

        def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
            steps, labels = row["completions"], _checked_labels(row, index, name)
            try:
                encoded = encode_steps(tokenizer, row["prompt"], steps, separator)
            except ValueError as error:
                raise ValueError(f"row {index} of the {name} data: {error}") from error
            if last_only:
                labels = [_NO_STEP] * (len(labels) - 1) + labels[-1:]
            input_ids = encoded.input_ids[:max_length]
            kept = sum(end < len(input_ids) for end in encoded.ends)
            return {
                "input_ids": input_ids,
                "step_ends": encoded.ends[:kept],
                "step_labels": labels[:kept],
                "num_cut": sum(label != _NO_STEP for label in labels[kept:]),
            }

        encoded = dataset.map(
            encode, with_indices=True, remove_columns=columns, num_proc=args.dataset_num_proc
        )
        self.step_reports[name], kept_rows = _report(encoded)
        if not kept_rows:
            raise ValueError(
                f"no step of the {name} data ends within max_length={max_length} tokens; raise it"
            )
        logger.warning("process reward %s data: %s", name, self.step_reports[name])
        return encoded.select(kept_rows).remove_columns("num_cut")

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "step_ends", "step_labels"]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        value_mask = inputs["labels"] != _NO_STEP
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            value_mask=value_mask,
        )
        logits = output.logits[..., 0][value_mask].float()
        targets = inputs["labels"][value_mask]
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        if num_items_in_batch is None:
            loss = loss / targets.numel()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # Gradients are averaged over processes, the count is summed over them.
                loss = loss * self.accelerator.num_processes
        self._record(logits.detach(), targets)
        return (loss, output) if return_outputs else loss

    def _record(self, logits: Tensor, targets: Tensor) -> None:
        """Accuracy per step; a soft label counts as right above one half."""
        hits = ((logits > 0) == (targets > 0.5)).sum()
        counts = torch.stack([hits, torch.tensor(targets.numel(), device=hits.device)])
        right, total = self.accelerator.gather(counts).view(-1, 2).sum(0).tolist()
        self._metrics["train" if self.model.training else "eval"]["accuracy"].append(right / total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._metrics[mode].items():
            logs[prefix + name] = sum(values) / len(values)
        self._metrics[mode].clear()
        super().log(logs, start_time)


@dataclass
class StepCollator:
    """Rows of `input_ids`, `step_ends`, `step_labels` as padded `[B, T]` tensors.

    `labels` is fp32: the label at each step's last token, -100 elsewhere.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), _NO_STEP)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.tensor(row["input_ids"])
            attention_mask[i, :length] = 1
            labels[i, row["step_ends"]] = torch.tensor(row["step_labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _load(model: Any, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    if isinstance(model, str):
        set_seed(seed)  # the new head is drawn
        model = AutoModelForTokenClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32
        )
    if getattr(model.config, "num_labels", None) != 1:
        raise ValueError(
            f"the model has num_labels={getattr(model.config, 'num_labels', None)}; a process "
            "reward model gives one logit per step. Load it with num_labels=1"
        )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _prepare_model(model: Any, args: PRMConfig, peft_config: Any) -> Any:
    if peft_config is not None:
        from peft import get_peft_model  # heavy, and only adapters need it

        if peft_config.target_modules == "all-linear" and not peft_config.modules_to_save:
            # Otherwise "all-linear" takes the head as well, which PEFT then cannot save in full.
            peft_config.modules_to_save = ["score"]
        model = get_peft_model(model, peft_config)
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    refuse_unsaved_head(model)
    if hasattr(model, "get_base_model") and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _checked_labels(row: dict[str, Any], index: int, name: str) -> list[float]:
    labels, steps = row["labels"], row["completions"]
    if len(labels) != len(steps):
        raise ValueError(
            f"row {index} of the {name} data has {len(steps)} completions and {len(labels)} "
            "labels; expected one label per step"
        )
    if any(label is None or not 0.0 <= label <= 1.0 for label in labels):
        raise ValueError(
            f"row {index} of the {name} data has labels {labels}; expected true, false, or a "
            "number from 0 to 1"
        )
    return [float(label) for label in labels]


def _report(encoded: Dataset) -> tuple[StepReport, list[int]]:
    """The report of an encoded data set, and the rows with a labelled step."""
    labelled = [
        [label for label in labels if label != _NO_STEP] for labels in encoded["step_labels"]
    ]
    kept_rows = [i for i, labels in enumerate(labelled) if labels]
    kept = [label for labels in labelled for label in labels]
    report = StepReport(
        rows=len(kept_rows),
        steps=len(kept),
        truncated_steps=sum(encoded["num_cut"]),
        dropped_rows=len(labelled) - len(kept_rows),
        mean_label=sum(kept) / max(1, len(kept)),
    )
    return report, kept_rows


__all__ = ["PRMConfig", "PRMTrainer", "StepCollator", "StepReport"]
