"""Several judges' scores as one, each judge weighted by how far it agrees.

    w_i = 1 / (ε + d_i)                                       agreement with the other judges
    w_i = 1 / (ε + d_i) · 1 / (ε + h_i)                       and with human labels, where given
    score_j = Σ_i w_i s_ij / Σ_i w_i                          over the judges that answered row j

d_i is the judge's mean distance from the median over the rows that two or more judges answered;
h_i its mean distance from the labels, drawn towards the judges' mean h̄ as if by k = 5 more rows,
so that a handful of labels does not decide: h_i = (Σ_j |s_ij − y_j| + k h̄) / (n_i + k).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["Scores", "agreement_weights", "combine_by_agreement", "weighted_scores"]

Scores = Sequence[Sequence[float | None]]  # [judges][rows]

_FLOOR = 0.05  # ε: a judge in perfect agreement weighs 20, not infinity
_PRIOR_LABELS = 5  # k


def agreement_weights(scores: Scores, human: Sequence[float | None] | None = None) -> list[float]:
    """One weight for each judge.

    Args:
        scores: in [0, 1], None where a judge gave none.
        human: labels of the rows on the same scale, None where there is none.

    Raises:
        ValueError: no judges, or lists of differing lengths.
    """
    _require_same_length(scores, human)
    answered = [[s for s in row if s is not None] for row in zip(*scores, strict=True)]
    # One voice agrees with itself: it says nothing about the judge.
    medians = [statistics.median(row) if len(row) > 1 else None for row in answered]
    weights = [1 / (_FLOOR + _mean(_distances(judge, medians))) for judge in scores]
    if human is None:
        return weights
    from_labels = [_distances(judge, human) for judge in scores]
    everyone = _mean([d for distances in from_labels for d in distances])
    shrunk = [
        (sum(distances) + _PRIOR_LABELS * everyone) / (len(distances) + _PRIOR_LABELS)
        for distances in from_labels
    ]
    return [weight / (_FLOOR + h) for weight, h in zip(weights, shrunk, strict=True)]


def weighted_scores(scores: Scores, weights: Sequence[float]) -> list[float | None]:
    """`[rows]`: the mean over the judges that answered, None where none did."""
    combined: list[float | None] = []
    for row in zip(*scores, strict=True):
        voting = [(w, s) for w, s in zip(weights, row, strict=True) if s is not None]
        total = sum(w for w, _ in voting)
        combined.append(sum(w * s for w, s in voting) / total if voting else None)
    return combined


def combine_by_agreement(
    scores: Scores, human: Sequence[float | None] | None = None
) -> list[float | None]:
    """Scores [judges][rows] to [rows]: mean weighted by agreement, None where no judge answered.

    Raises:
        ValueError: no judges, or lists of differing lengths.
    """
    return weighted_scores(scores, agreement_weights(scores, human))


def _distances(scores: Sequence[float | None], targets: Sequence[float | None]) -> list[float]:
    return [
        abs(score - target)
        for score, target in zip(scores, targets, strict=True)
        if score is not None and target is not None
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _require_same_length(scores: Scores, human: Sequence[float | None] | None) -> None:
    if not scores or len({len(row) for row in scores}) != 1:
        raise ValueError("give one list of scores a judge, all of the same length")
    if human is not None and len(human) != len(scores[0]):
        raise ValueError(f"{len(human)} human labels for {len(scores[0])} rows; None where none is")
