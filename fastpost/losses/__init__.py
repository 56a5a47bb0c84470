"""Losses of post-training as pure functions over log-probs: one file per method, a variant is a
function of its own.

Tensors in, a tensor or a `NamedTuple` out; torch only, no trainer, no configuration object. Masks
are boolean, True = scored. Losses over pairs and labelled answers are per pair and not reduced:
take the mean. Losses over tokens are reduced, over a global count where one is given. Every
function refuses hyperparameters out of range and tensors that would broadcast.
"""

from __future__ import annotations

from fastpost.losses.advantages import (
    centred_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from fastpost.losses.aot import aot_loss, aot_unpaired_loss
from fastpost.losses.apo import apo_down_loss, apo_zero_loss
from fastpost.losses.bco import bco_pair_loss
from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_surrogate, clipped_token_loss
from fastpost.losses.cpo import cpo_hinge_loss, cpo_ipo_loss, cpo_loss
from fastpost.losses.dapo import dapo_loss
from fastpost.losses.discopop import discopop_loss
from fastpost.losses.dpo import dpo_loss
from fastpost.losses.dpo_norm import dpo_norm_loss
from fastpost.losses.dr_grpo import dr_grpo_loss
from fastpost.losses.entropy import mean_entropy, token_entropy
from fastpost.losses.exo import exo_pair_loss
from fastpost.losses.f_divergence import (
    Score,
    alpha_divergence_score,
    forward_kl_score,
    js_divergence_score,
    reverse_kl_score,
)
from fastpost.losses.gae import AdvantageEstimate, gae
from fastpost.losses.grpo import grpo_loss
from fastpost.losses.gspo import gspo_loss
from fastpost.losses.hinge import hinge_loss
from fastpost.losses.ipo import ipo_loss
from fastpost.losses.kl import kl_k1, kl_k2, kl_k3
from fastpost.losses.kto import UnpairedLoss, apo_zero_unpaired_loss, kto_loss, kto_reference_point
from fastpost.losses.ld_dpo import LengthDesensitised, ld_seq_logps
from fastpost.losses.nca import nca_pair_loss
from fastpost.losses.orpo import ORPOLoss, log_odds, orpo_loss
from fastpost.losses.ppo import kl_penalised_rewards, ppo_loss
from fastpost.losses.preference import PreferenceLoss
from fastpost.losses.reward import BradleyTerryLoss, bradley_terry_loss
from fastpost.losses.rloo import rloo_loss
from fastpost.losses.robust_dpo import robust_dpo_loss
from fastpost.losses.sequence import seq_mean, seq_sum, token_mean
from fastpost.losses.sft import dft_loss, sft_loss
from fastpost.losses.simpo import simpo_loss
from fastpost.losses.sppo import sppo_hard_loss
from fastpost.losses.value import ValueLoss, value_loss

__all__ = [
    "AdvantageEstimate",
    "BradleyTerryLoss",
    "LengthDesensitised",
    "ORPOLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "Score",
    "UnpairedLoss",
    "ValueLoss",
    "alpha_divergence_score",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_pair_loss",
    "bradley_terry_loss",
    "centred_advantages",
    "clipped_surrogate",
    "clipped_token_loss",
    "cpo_hinge_loss",
    "cpo_ipo_loss",
    "cpo_loss",
    "dapo_loss",
    "dft_loss",
    "discopop_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "dr_grpo_loss",
    "exo_pair_loss",
    "forward_kl_score",
    "gae",
    "group_advantages",
    "grpo_loss",
    "gspo_loss",
    "hinge_loss",
    "ipo_loss",
    "js_divergence_score",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalised_rewards",
    "kto_loss",
    "kto_reference_point",
    "ld_seq_logps",
    "leave_one_out_advantages",
    "log_odds",
    "mean_entropy",
    "nca_pair_loss",
    "orpo_loss",
    "ppo_loss",
    "reverse_kl_score",
    "rloo_loss",
    "robust_dpo_loss",
    "seq_mean",
    "seq_sum",
    "sft_loss",
    "simpo_loss",
    "sppo_hard_loss",
    "token_entropy",
    "token_mean",
    "value_loss",
    "whiten",
]
