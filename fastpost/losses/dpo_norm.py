"""Length-normalised DPO (Tülu 3, Lambert 2024, arXiv 2411.15124; `sigmoid_norm` in TRL).

    loss = −log σ(β (ū_w − ū_l)),    ū = [log π(y|x) − log π_ref(y|x)] / max(1, |y|)

The mean over tokens removes the gain from length alone; β is larger than in DPO, 5 in the paper.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_positive, require_same_shape
from fastpost.losses.f_divergence import Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def dpo_norm_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    chosen_lens: Tensor,  # [P] scored tokens
    rejected_lens: Tensor,  # [P] scored tokens
    *,
    beta: float = 5.0,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """Length-normalised DPO per pair, from sums of log-probs and lengths; a length 0 counts as 1.

    The rewards are β times the log-ratio of the whole sequence, as TRL reports them.

    Args:
        beta: strength of the pull to the reference, > 0.
        score: f-divergence, see `f_divergence`; applied before the division by the length.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "5.0")
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    require_same_shape(
        policy_chosen_seq_logps=chosen, chosen_lens=chosen_lens, rejected_lens=rejected_lens
    )
    margin = score(chosen) / chosen_lens.clamp(min=1) - score(rejected) / rejected_lens.clamp(min=1)
    loss = -F.logsigmoid(beta * margin)
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["dpo_norm_loss"]
