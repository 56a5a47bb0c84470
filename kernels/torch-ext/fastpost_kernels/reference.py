"""The specification: every op in plain torch, any dtype, nothing hidden.

These materialise everything and are slow; tests evaluate them in float64 and call that the truth.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "adamw",
    "dora_linear",
    "dora_weight_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "lora_linear",
    "preference_logratio",
    "prefix_attention",
    "rms_norm",
    "swiglu",
]


def logits(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """`softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature`, [M, V]; an adapter makes
    W + s B A of W."""
    y = torch.nn.functional.linear(hidden, weight, bias)
    if lora is not None:
        lora_a, lora_b, lora_scale = lora  # [r, H], [V, r]
        y = y + lora_scale * (hidden @ lora_a.T @ lora_b.T)
    z = y * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logprob(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M] int64, -100 where a row is not scored
    bias: Tensor | None = None,  # [V]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> dict[str, Tensor]:
    """Every output of `fastpost_kernels.linear_logprob`, each [M]; unscored rows are zero."""
    z = logits(
        hidden,
        weight,
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
    )
    scored = targets != -100
    log_p = z - z.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    target = targets.where(scored, 0)
    outputs = {
        "logprob": log_p.gather(-1, target[:, None]).squeeze(-1),
        "entropy": -(p * log_p).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == target,
    }
    return {name: value.where(scored, torch.zeros_like(value)) for name, value in outputs.items()}


def preference_logratio(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M]
    cu_seqlens: Tensor,  # [S + 1], from 0 to N
    ref_logprob: Tensor,  # [N], the reference's of each place
    bias: Tensor | None = None,  # [V]
    *,
    places: Tensor | None = None,  # [N], the row at each place
    token_weights: Tensor | None = None,  # [N]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> dict[str, Tensor]:
    """The differentiable outputs of `fastpost_kernels.preference_logratio`, and `num_tokens`."""
    logprob = linear_logprob(
        hidden,
        weight,
        targets,
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )["logprob"]
    places = torch.arange(len(targets)) if places is None else places
    weights = torch.ones(len(places)) if token_weights is None else token_weights
    bounds = list(pairwise(cu_seqlens.tolist()))
    half = len(bounds) // 2

    def sums(values: Tensor) -> Tensor:
        return torch.stack([values.new_zeros(()), *(values[a:b].sum() for a, b in bounds)])[1:]

    logps = sums(logprob[places] * weights.to(logprob))
    ref_logps = sums(ref_logprob * weights.to(ref_logprob))
    num_tokens = sums((targets[places] != -100).to(logprob))
    logratios = logps - ref_logps
    return {
        "logps": logps,
        "mean_logps": logps / num_tokens.clamp(min=1),
        "ref_logps": ref_logps,
        "logratios": logratios,
        "margins": logratios[:half] - logratios[half:],
        "num_tokens": num_tokens,
        "logprob": logprob,
    }


def linear_cross_entropy(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M]
    bias: Tensor | None = None,  # [V]
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Sum over scored rows of cross-entropy (torch's label smoothing) + z_loss * logsumexp^2."""
    z = logits(
        hidden,
        weight,
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
    )
    loss = torch.nn.functional.cross_entropy(
        z, targets, reduction="sum", label_smoothing=label_smoothing
    )
    return loss + z_loss * z.logsumexp(-1)[targets != -100].square().sum()


def prefix_attention(
    query: Tensor,  # [Hq, N, D]
    key: Tensor,  # [Hk, N, D]
    value: Tensor,  # [Hk, N, Dv]
    segments: Tensor,  # [S, 3] int64: start, end, subtree_end
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
) -> Tensor:
    """Dense masked attention over a forest of segments, [Hq, N, Dv]."""
    heads, num_tokens, head_dim = query.shape
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for start, end, subtree_end in segments.tolist():
        visible[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        visible[end:subtree_end, start:end] = True
    depth = visible.sum(1) - 1  # position of a token on its own path
    if window is not None:
        visible &= depth[:, None] - depth[None, :] < window
    visible = visible.to(query.device)
    groups = heads // key.shape[0]
    scale = head_dim**-0.5 if scale is None else scale
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(-1, num_tokens, 1)], -1)
    probs = scores.softmax(-1)[..., :num_tokens]
    return probs @ value.repeat_interleave(groups, 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [..., H], [H]
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # [..., I] each
    """`silu(gate) * up`."""
    return gate * torch.sigmoid(gate) * up


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Tensor,  # [r, K]
    b: Tensor,  # [N, r]
    scale: float,
    kept: Tensor | None = None,  # [..., K], 1 / (1 - p) or 0: dropout on the adapter's input
) -> Tensor:
    """`x W^T + bias + scale (kept x A^T) B^T`."""
    dropped = x if kept is None else x * kept
    return torch.nn.functional.linear(x, weight, bias) + scale * (dropped @ a.T @ b.T)


def dora_weight_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`||W + scale B A||` of every row, [N]."""
    return torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)


def dora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Tensor,  # [r, K]
    b: Tensor,  # [N, r]
    scale: float,
    magnitude: Tensor,  # [N]
    weight_norm: Tensor,  # [N], a constant
    kept: Tensor | None = None,  # [..., K]
) -> Tensor:
    """`magnitude / weight_norm * (x W^T + scale (kept x A^T) B^T) + bias`."""
    y = magnitude / weight_norm * lora_linear(x, weight, None, a, b, scale, kept)
    return y if bias is None else y + bias


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after step number `step`, all of one shape: `adamw_8bit_` on values."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    update = exp_avg / (1 - betas[0] ** step) / denominator
    return param * (1 - lr * weight_decay) - lr * update, exp_avg, exp_avg_sq
