"""Contrastive preference optimisation (Xu 2024, arXiv 2401.08417, eq. 3) and SimPO on its frame.

    sigmoid   loss = −log σ(β (log π(y_w) − log π(y_l))) + cpo_alpha · NLL(y_w)
    simpo     loss = −log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)   (Meng 2024, 2405.14734)

`loss_type` also takes "hinge", "ipo" (per-token means, like SimPO) and "alphapo" (Gupta 2025,
arXiv 2501.03884). SimPO proper is `loss_type="simpo", cpo_alpha=0`. The NLL is the mean over the
tokens of the chosen answers. A drop-in for TRL's experimental `CPOTrainer`: same constructor, same
configuration fields, same loss, same metrics, same parameters after the same steps. Data, one row:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}]}

Two things differ on purpose. `logits/chosen` and `logits/rejected` are means over the answers'
tokens; TRL's include prompts and padding. An answer that truncation left empty has the mean
log-prob 0; TRL's is NaN.

Refused: encoder-decoder models, `model_init`, and DeepSpeed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trl.import_utils import TRLExperimentalWarning

from fastpost.adapters.preset import preset_argument
from fastpost.trainers.engine_config import EngineConfig, as_config
from fastpost.trainers.reference_free import ReferenceFreeTrainer, check_arguments

# TRL warns that what lies there may move. We are built and tested against one version of TRL.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import cpo as trl_cpo


@dataclass
class CPOConfig(EngineConfig, trl_cpo.CPOConfig):
    """TRL's `CPOConfig` and the fields of the engine."""


class CPOTrainer(ReferenceFreeTrainer, trl_cpo.CPOTrainer):
    """TRL's `CPOTrainer` on the packed, prefix-shared, logit-free forward.

    Overrides `concatenated_forward`.

    Raises:
        ValueError: an encoder-decoder, a model to be made later, or a data set that lacks columns
            or rows.
    """

    def __init__(
        self,
        model: Any = None,
        args: CPOConfig | trl_cpo.CPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, CPOConfig)
        kwargs |= preset_argument(args, kwargs)
        check_arguments("CPO", model, args, train_dataset, model_init)
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
        """Log-probs `[P]` of chosen and rejected answers, their mean logits, the NLL."""
        scores = self._score_pairs(model, batch, self.pad_token_id, score_chosen_prompts=False)
        is_normalised = self.loss_type in ("ipo", "simpo")
        logps = scores.mean_logps if is_normalised else scores.sum_logps
        chosen, rejected = logps.chunk(2)
        nll = scores.chosen_nll if self.cpo_alpha else scores.chosen_nll.new_zeros(())
        found = (chosen, rejected, scores.chosen_logit, scores.rejected_logit, nll)
        return found if scores.aux_loss is None else (*found, scores.aux_loss)


__all__ = ["CPOConfig", "CPOTrainer"]
