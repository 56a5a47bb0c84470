"""Odds ratio preference optimisation (Hong 2024, arXiv 2403.07691, eq. 4, 6 and 7).

    p = exp(mean log-prob of an answer's tokens),   odds = p / (1 − p)
    loss = NLL(x, y_w) − β log σ(log odds(y_w) − log odds(y_l))

β is the paper's λ. As in TRL, the NLL is the mean over every token of the chosen rows, prompt
included. A drop-in for TRL's experimental `ORPOTrainer`: same constructor, same configuration
fields, same loss, same metrics, same parameters after the same steps. Data, one row:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}]}

Two things differ on purpose. `logits/chosen` and `logits/rejected` are means over the answers'
tokens; TRL's include prompts and padding. An answer that truncation left empty has the mean
log-prob 0 and no gradient; TRL's loss is NaN there.

Refused: encoder-decoder models, `model_init`, and DeepSpeed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from trl.import_utils import TRLExperimentalWarning

from fastpost.adapters.preset import preset_argument
from fastpost.losses.orpo import log_odds
from fastpost.trainers.engine_config import EngineConfig, as_config
from fastpost.trainers.reference_free import ReferenceFreeTrainer, check_arguments

# TRL warns that what lies there may move. We are built and tested against one version of TRL.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import orpo as trl_orpo


@dataclass
class ORPOConfig(EngineConfig, trl_orpo.ORPOConfig):
    """TRL's `ORPOConfig` and the fields of the engine."""


class ORPOTrainer(ReferenceFreeTrainer, trl_orpo.ORPOTrainer):
    """TRL's `ORPOTrainer` on the packed, prefix-shared, logit-free forward.

    Overrides `concatenated_forward` and `odds_ratio_loss`.

    Raises:
        ValueError: an encoder-decoder, a model to be made later, or a data set that lacks columns
            or rows.
    """

    def __init__(
        self,
        model: Any = None,
        args: ORPOConfig | trl_orpo.ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, ORPOConfig)
        kwargs |= preset_argument(args, kwargs)
        check_arguments("ORPO", model, args, train_dataset, model_init)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            None,
            *rest,
            **kwargs,
        )
        self._install_engine(args)

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Mean log-probs `[P]` of chosen and rejected answers, their mean logits, the NLL."""
        scores = self._score_pairs(model, batch, self.padding_value, score_chosen_prompts=True)
        chosen, rejected = scores.mean_logps.chunk(2)
        found = (chosen, rejected, scores.chosen_logit, scores.rejected_logit, scores.chosen_nll)
        return found if scores.aux_loss is None else (*found, scores.aux_loss)

    def odds_ratio_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """TRL's, with log-probs cut below 0, where the odds would be infinite.

        Args:
            policy_chosen_logps: `[P]` mean log-probs.
            policy_rejected_logps: `[P]`.

        Returns:
            `[P]` β log σ, which is subtracted from the loss; `[P]` rewards of chosen and rejected;
            `[]` mean log σ; `[]` mean log-odds ratio.
        """
        ratio = log_odds(policy_chosen_logps) - log_odds(policy_rejected_logps)
        log_sigmoid = F.logsigmoid(ratio)
        return (
            self.beta * log_sigmoid,
            self.beta * policy_chosen_logps.detach(),
            self.beta * policy_rejected_logps.detach(),
            log_sigmoid.mean(),
            ratio.mean(),
        )


__all__ = ["ORPOConfig", "ORPOTrainer"]
