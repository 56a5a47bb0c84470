"""Supervised fine-tuning on response tokens.

    loss = Σ_t m_t · nll_t / max(1, Σ_t m_t),  the denominator over the accumulated batch and ranks

A drop-in for `trl.SFTTrainer`: same constructor, same configuration fields, same metrics, same
parameters after the same steps. Beneath it every batch is packed, equal beginnings are computed
once, and only scored tokens reach the head. Data, one row:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "completion": [{"role": "assistant", "content": "4"}]}

or any other format TRL takes (`text`, `messages`, tokenised `input_ids` with `labels`). With
`assistant_only_loss` a chat template needs no generation markers: turns are found by rendering the
conversation step by step.

Refused: a data set of which nothing would be scored, one of which everything would be scored
although its prompts should be masked, and DeepSpeed (see
`engine_config`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import trl
from trl.trainer import sft_trainer as trl_sft

from fastpost.adapters.preset import preset_argument
from fastpost.guards.assistant_rows import mask_assistant_turns
from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.mask import MaskReport, count_mask
from fastpost.guards.special_tokens import check_special_tokens
from fastpost.guards.unmarked_template import is_unmarked, unmarked_templates_allowed
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer, logger
from fastpost.trainers.seam import engine_at_seam


@dataclass
class SFTConfig(EngineConfig, trl.SFTConfig):
    """`trl.SFTConfig` and the fields of the engine."""


class SFTTrainer(EngineTrainer, trl.SFTTrainer):
    """`trl.SFTTrainer` on the packed, prefix-shared, logit-free forward.

    Attributes:
        mask_reports: data set name -> what of it is scored, truncated, left without a label.

    Raises:
        ValueError: the data set lacks columns, is empty, or its mask cannot be meant.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | trl.SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, SFTConfig)
        kwargs |= preset_argument(args, kwargs)
        refuse_unsupported(args)
        if train_dataset is not None and kwargs.get("formatting_func") is None:
            require_rows(train_dataset, "train_dataset")
            require_columns(
                column_names(train_dataset),
                [
                    [args.dataset_text_field],
                    ["messages"],
                    ["conversations"],
                    ["prompt", "completion"],
                    ["input_ids"],
                ],
                "SFT",
            )
        self.mask_reports: dict[str, MaskReport] = {}
        with unmarked_templates_allowed(trl_sft), engine_at_seam(trl_sft, args) as engines:
            super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        self._take_engines(engines)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        was_text = "input_ids" not in column_names(dataset)
        if args.assistant_only_loss and is_unmarked(processing_class):
            dataset = mask_assistant_turns(
                dataset,
                processing_class,
                completion_only=self.completion_only_loss,
                num_proc=args.dataset_num_proc,
            )
        # TRL tokenises, cuts and packs in one go; the report needs the rows before the cut. Its
        # second pass over tokenised rows only cuts and packs.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting_func, dataset_name
        )
        if was_text:  # rows that were tokenised by the user are taken as they are meant
            check_special_tokens(dataset, self._tokenizer)
        report = count_mask(
            dataset,
            # A packed row is filled to max_length; its sequences are split there, not cut.
            None if packing and args.packing_strategy != "bfd" else args.max_length,
            args.truncation_mode,
            prompt_is_masked=self.completion_only_loss or args.assistant_only_loss,
            tokenizer=self._tokenizer,
        )
        self.mask_reports[dataset_name] = report
        logger.warning("SFT %s data: %s", dataset_name, report)
        return super()._prepare_dataset(
            dataset, processing_class, args, packing, None, dataset_name
        )


__all__ = ["SFTConfig", "SFTTrainer"]
