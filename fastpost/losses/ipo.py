"""Identity preference optimisation (Azar 2023, arXiv 2310.12036, eq. 17), length-normalised.

    loss = (ū_w − ū_l − 1/(2β))²,    ū = [log π(y|x) − log π_ref(y|x)] / max(1, |y|)

β is τ of the paper. The paper writes sequence log-probs; its authors' results are those of means
per token, as in TRL, so that the target 1/(2β) does not depend on the length.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.arguments import require_positive, require_same_shape
from fastpost.losses.f_divergence import Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def ipo_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    chosen_lens: Tensor,  # [P] scored tokens
    rejected_lens: Tensor,  # [P] scored tokens
    *,
    beta: float = 0.1,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """IPO per pair, from sums of log-probs and lengths; a length of 0 counts as 1.

    Args:
        beta: τ of the paper, > 0: a smaller one asks for a larger margin.
        score: f-divergence, see `f_divergence`; applied before the division by the length.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
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
    loss = (margin - 1 / (2 * beta)).square()
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["ipo_loss"]
