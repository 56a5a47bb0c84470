"""Reward model from preference pairs (Ouyang 2022, arXiv 2203.02155, eq. 1).

    loss = −log σ(r(x, y_w) − r(x, y_l) − m) + c (r(x, y_w) + r(x, y_l))²

with a margin m per pair (Touvron 2023, arXiv 2307.09288, eq. 2) and a centring c (Eisenstein 2023,
arXiv 2312.09244) where they are given. A drop-in for `trl.RewardTrainer`: same constructor, same
configuration fields, same metrics, same parameters after the same steps. Beneath it the two answers
of a pair share their prompt, padding is never computed, and nothing behind the token that carries
the reward. Data, one row, `margin` optional:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}], "margin": 1.0}

The reward is read at the rightmost token that is not padding. With padding id = end-of-sequence id
that is the last token of the text; give the tokenizer a padding token of its own to train the end
of the answer too.

Refused: an adapter that would leave the reward head random on reload, a data set of which
`max_length` leaves nothing, `memory_budget_gb` (there is no language-model head), more than one
label, and DeepSpeed. Reported: pairs that `max_length` drops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl

from fastpost.adapters.preset import preset_argument
from fastpost.guards.classifier import refuse_head_budget, refuse_unsaved_head
from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.pooling import accelerate_pooled
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer, logger


@dataclass
class RewardConfig(EngineConfig, trl.RewardConfig):
    """`trl.RewardConfig` and the fields of the engine."""


class RewardTrainer(EngineTrainer, trl.RewardTrainer):
    """`trl.RewardTrainer` on the packed, prefix-shared forward.

    Raises:
        ValueError: the data set lacks columns, is empty or too long throughout, or the head would
            not be saved.
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig | trl.RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, RewardConfig)
        kwargs |= preset_argument(args, kwargs, "SEQ_CLS")
        refuse_unsupported(args)
        refuse_head_budget(args)
        if train_dataset is not None:
            require_rows(train_dataset, "train_dataset")
            require_columns(
                column_names(train_dataset),
                [
                    ["chosen", "rejected"],
                    ["chosen_ids", "rejected_ids"],
                    ["chosen_input_ids", "rejected_input_ids"],
                ],
                "a reward model",
            )
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        refuse_unsaved_head(self.model)
        self._take_engines([accelerate_pooled(self.model, prefix_sharing=args.prefix_sharing)])

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not hasattr(dataset, "__len__"):
            return prepared
        dropped = len(dataset) - len(prepared)
        if dropped == len(dataset):
            raise ValueError(
                f"every pair of the {dataset_name} data is longer than max_length="
                f"{args.max_length} tokens; raise it"
            )
        if dropped:
            logger.warning(
                "reward %s data: %d of %d pairs dropped, longer than max_length=%d",
                dataset_name,
                dropped,
                len(dataset),
                args.max_length,
            )
        return prepared

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # TRL passes the margin to the model too, whose own forward would drop it unread.
        def without_margin(margin: Any = None, **rest: Any) -> Any:
            return model(**rest)

        return super().compute_loss(without_margin, inputs, return_outputs, num_items_in_batch)


__all__ = ["RewardConfig", "RewardTrainer"]
