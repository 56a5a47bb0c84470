"""Policy and reference log-probs of preference pairs: per-sequence sums, log-ratios and margins.

    logps_s = sum_{i in s} w_i log pi(t_i),   ref_logps_s the same under the reference
    logratios_s = logps_s - ref_logps_s,      margins_p = logratios_p - logratios_{P + p}
    d L / d h_m = (d L / d logprob_m) J_m,    J = d logprob / d h   (`linear_logprob.py`)

Strategy. Both sides are walks of `linear_logprob`; logits exist as one reused tile.
  * The policy with a frozen head leaves J behind: 2 GEMMs. Sums, means, log-ratios and margins are
    linear in the log-probs, so whatever loss follows has a backward that is one row scaling of J.
    With a trained head the backward recomputes: 4 GEMMs in all.
  * The reference has no gradient: 1 GEMM and M numbers.
  * If both have one head (a reference that is the policy with its adapter off) they go over it
    together: each tile of it is read, and cast where it must be, once for both.
  * Sequences may share rows (answers of a pair that begin alike): `places` says where rows stand.
  * A reference known beforehand enters as its sums.
Rejected: policy and reference rows in one GEMM of twice the height. The tile would double or rows
be split sooner, and an accumulator of half the rows is another kernel; the tile of the head is what
has to come from far, and it is shared either way.

One head GEMM is 2 M H V FLOP. Peak memory beyond results: as `linear_logprob`, and the reference's
rows of one chunk; it grows neither with V (but for a bias, held once in fp32) nor with S.
Legend: M rows, N places, S sequences, P = S / 2 pairs, H hidden, V vocabulary.
Sources: Rafailov et al., DPO (arXiv:2305.18290, eq. 7); sums weighed by token, Liu et al., LD-DPO
(arXiv:2409.06411); means, Meng et al., SimPO (arXiv:2405.14734, eq. 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cost import register_costs
from ._device import resolve_backend
from ._linear_arguments import (
    check_outputs,
    check_tensors,
    resolve_settings,
    resolve_transform,
)
from ._logprob_walks import backward, forward, forward_pair, no_result
from ._namespace import add_op_namespace_prefix
from ._preference_arguments import HeadRows, check_sequences, reference_arguments
from ._sequence_sums import Sequences
from ._vocab_passes import BLOCK_ELEMENTS, LogitTransform
from ._vocab_tiles import IGNORE, Head, statistics_dtype
from ._vocab_workspace import (
    ROW_VECTORS,
    HeadSize,
    fold_plan,
    fold_workspace,
    recompute_workspace,
)

__all__ = ["HeadRows", "PreferenceLogratio", "preference_logratio"]

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# float64 or int64 numbers alive at once in `Sequences`, per place and row, and per sequence.
PLACE_NUMBERS, SEQUENCE_NUMBERS = 12, 12


class PreferenceLogratio(NamedTuple):
    """Per sequence [S], pair [P] or row of the policy [M], in float32 (float64 for float64).

    `logps`, `mean_logps`, `logratios`, `margins` and `logprob` carry gradients to the policy.
    The last four are None unless asked for.
    """

    logps: Tensor  # [S] weighted sums of the policy; 0 for an empty sequence
    mean_logps: Tensor  # [S] the same per scored token; 0 for an empty sequence
    ref_logps: Tensor  # [S]
    logratios: Tensor  # [S] logps - ref_logps
    margins: Tensor  # [P] log-ratio of the chosen less that of the rejected
    num_tokens: Tensor  # [S] int64, scored tokens
    logprob: Tensor  # [M]
    entropy: Tensor | None = None  # [M]
    log_sum_sq_probs: Tensor | None = None  # [M]
    mean_logits: Tensor | None = None  # [M]
    is_top1: Tensor | None = None  # [M] bool


@torch.library.custom_op(add_op_namespace_prefix("preference_logratio_fwd"), mutates_args=())
def preference_logratio_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    places: Tensor | None,
    ref_hidden: Tensor | None,  # None: no reference rows
    ref_targets: Tensor | None,
    ref_weight: Tensor | None,  # None: the policy's head
    ref_bias: Tensor | None,
    ref_places: Tensor | None,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # comma-separated names
    with_jacobian: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, ref_logps, num_tokens, logprob, the OUTPUTS in order, stats, jacobian; absent ones
    have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    head = Head(hidden, weight, bias, targets, transform, backend, compute_dtype, memory_budget)
    names = tuple(name for name in outputs.split(",") if name)
    sequences = Sequences(cu_seqlens, places, token_weights, hidden.shape[0])
    ref_logps = hidden.new_empty(0, dtype=head.stats_dtype)
    with torch.cuda.device_of(hidden):
        if ref_hidden is None:
            found = forward(head, names, with_jacobian)
        else:
            assert ref_targets is not None
            reference = head._replace(hidden=ref_hidden, targets=ref_targets)
            ref_sequences = Sequences(cu_seqlens, ref_places, token_weights, ref_hidden.shape[0])
            if ref_weight is None:
                found, ref_found = forward_pair(head, reference, names, with_jacobian)
            else:
                found = forward(head, names, with_jacobian)
                ref_found = forward(reference._replace(weight=ref_weight, bias=ref_bias), (), False)
            ref_logps = ref_sequences.sums(ref_found["logprob"])
    absent = {name: no_result(hidden, name, compute_dtype) for name in (*OUTPUTS, "jacobian")}
    found = absent | found
    entropy, squares, mean, top1 = (found[name] for name in OUTPUTS)
    return (
        sequences.sums(found["logprob"]),
        ref_logps,
        sequences.counts(targets != IGNORE),
        found["logprob"],
        entropy,
        squares,
        mean,
        top1,
        found["stats"],
        found["jacobian"],
    )


@preference_logratio_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    places: Tensor | None,
    ref_hidden: Tensor | None,
    ref_targets: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_places: Tensor | None,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    with_jacobian: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    (rows, width), count = hidden.shape, cu_seqlens.shape[0] - 1
    wide, names = statistics_dtype(compute_dtype), outputs.split(",")
    optional = [
        hidden.new_empty(rows, dtype=torch.bool if name == "is_top1" else wide)
        if name in names
        else no_result(hidden, name, compute_dtype)
        for name in OUTPUTS
    ]
    return (
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(0 if ref_hidden is None else count, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
        hidden.new_empty(rows, dtype=wide),
        *optional,
        hidden.new_empty(4, rows, dtype=wide),
        hidden.new_empty((rows, width) if with_jacobian else (0,)),
    )


@torch.library.custom_op(add_op_namespace_prefix("preference_logratio_bwd"), mutates_args=())
def preference_logratio_bwd(
    grad_logps: Tensor | None,  # [S]
    grad_logprob: Tensor | None,  # [M]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    places: Tensor | None,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    stats: Tensor,
    jacobian: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden, d weight, d bias; those not needed have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    head = Head(hidden, weight, bias, targets, transform, backend, compute_dtype, memory_budget)
    grad = grad_logprob
    if grad_logps is not None:
        sequences = Sequences(cu_seqlens, places, token_weights, hidden.shape[0])
        grad = sequences.spread(grad_logps)
        if grad_logprob is not None:
            grad = grad + grad_logprob
    with torch.cuda.device_of(hidden):
        d_hidden, d_weight, d_bias = backward(
            head,
            stats,
            jacobian if jacobian.dim() == 2 else None,
            (grad, None, None),
            (need_hidden, need_weight, need_bias),
        )
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight,
        (weight if bias is None else bias).new_empty(0) if d_bias is None else d_bias,
    )


@preference_logratio_bwd.register_fake
def _(
    grad_logps: Tensor | None,
    grad_logprob: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    places: Tensor | None,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    stats: Tensor,
    jacobian: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_like = weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias_like.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, places = inputs[:5]
    cu_seqlens, token_weights, *transform = inputs[10:15]
    *_, stats, jacobian = output
    ctx.save_for_backward(
        hidden, weight, targets, bias, places, cu_seqlens, token_weights, stats, jacobian
    )
    ctx.transform, ctx.settings = transform, inputs[17:]
    # an output that no loss uses then arrives as None and costs nothing
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logps, grad_logprob = grads[0], grads[3]
    unused = (None,) * 16
    if grad_logps is None and grad_logprob is None:
        return (None, None, None, None, *unused)
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    d_hidden, d_weight, d_bias = preference_logratio_bwd(
        grad_logps,
        grad_logprob,
        *ctx.saved_tensors,
        *ctx.transform,
        need_hidden,
        need_weight,
        need_bias,
        *ctx.settings,
    )
    return (
        d_hidden if need_hidden else None,
        d_weight if need_weight else None,
        None,
        d_bias if need_bias else None,
        *unused,
    )


preference_logratio_fwd.register_autograd(_backward, setup_context=_setup_context)


def _forward_flops(hidden: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    ref_hidden, ref_weight, with_jacobian = args[3], args[5], args[14]
    vocab, width = weight
    policy = 2 * hidden[0] * vocab * width * (1 + bool(with_jacobian))
    if ref_hidden is None:
        return policy
    return policy + 2 * ref_hidden[0] * width * (vocab if ref_weight is None else ref_weight[0])


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    (rows, width), vocab, jacobian, needs = args[2], args[3][0], args[10], args[14:17]
    if len(jacobian) == 2:
        return 0
    return 2 * rows * width * vocab * (1 + needs[0] + needs[1])


def _sequence_bytes(rows: int, places: Tensor | None, cu_seqlens: Tensor) -> int:
    count = rows + (0 if places is None else places.shape[0])
    return 8 * (PLACE_NUMBERS * count + SEQUENCE_NUMBERS * cu_seqlens.shape[0])


def _forward_workspace(hidden: Tensor, weight: Tensor, *args: Any) -> int:
    places, ref_hidden, ref_weight = args[2], args[3], args[5]
    ref_places, cu_seqlens = args[7], args[8]
    with_jacobian, backend, dtype, budget = args[14:]
    size = HeadSize.of(hidden, weight, backend, dtype, budget)
    total = _sequence_bytes(size.rows, places, cu_seqlens)
    if ref_hidden is None:
        return total + fold_workspace(size, dtype, with_jacobian)
    head = weight if ref_weight is None else ref_weight
    ref_size = HeadSize.of(ref_hidden, head, backend, dtype, budget)
    total += _sequence_bytes(ref_size.rows, ref_places, cu_seqlens)
    if ref_weight is not None:  # one walk after the other
        separate = (
            fold_workspace(size, dtype, with_jacobian),
            fold_workspace(ref_size, dtype, False),
        )
        return total + max(separate)
    # Beside one walk over the taller side: the other's rows and statistics.
    tall = size._replace(rows=max(size.rows, ref_size.rows))
    chunk, _ = fold_plan(
        tall.rows, size.vocab, size.width, dtype, with_jacobian, budget, size.device
    )
    copies = 2 * size.gemm_bytes + size.hidden_bytes + size.weight_bytes
    total += chunk * size.width * copies + ROW_VECTORS * tall.rows * size.wide_bytes
    return total + fold_workspace(tall, dtype, with_jacobian)


def _backward_workspace(*args: Any) -> int:
    hidden, weight, places, cu_seqlens, jacobian = args[2], args[3], args[6], args[7], args[10]
    needs, settings = args[14:17], args[17:]
    size = HeadSize.of(hidden, weight, *settings)
    total = _sequence_bytes(size.rows, places, cu_seqlens)
    if jacobian.dim() == 2:
        return total + 2 * BLOCK_ELEMENTS * size.wide_bytes
    return total + recompute_workspace(size, needs)


register_costs(preference_logratio_fwd, flops=_forward_flops, workspace=_forward_workspace)
register_costs(preference_logratio_bwd, flops=_backward_flops, workspace=_backward_workspace)


def preference_logratio(
    policy: HeadRows,
    reference: HeadRows | Tensor,  # or what is known of it, sums [S]
    cu_seqlens: Tensor,  # [S + 1] int32 or int64
    *,
    token_weights: Tensor | None = None,  # [N]
    outputs: Sequence[str] = (),
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> PreferenceLogratio:
    """Log-probs of preference pairs under policy and reference, without the logits of either.

    Equals, in float32 and without [M, V] tensors, with `lp` as in `linear_logprob`:

        logps = [(w * lp(policy)[places])[a:b].sum() for a, b in pairwise(cu_seqlens)]
        logratios = logps - ref_logps;  margins = logratios[:P] - logratios[P:]

    Args:
        policy: its rows and head. Gradients reach `hidden`, `weight` and `bias`.
        reference: rows and head of the reference, or its sums [S]. No gradient reaches it. If its
            `weight` and `bias` are the policy's own tensors, both go over the head together.
        cu_seqlens: where the sequences start and end among the N places of both sides, from 0 to
            N; the first half are the chosen ones. Empty sequences have sum and mean 0.
        token_weights: factor of each place in the sums; they do not change what is counted.
        outputs: names out of "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1", of the
            policy's rows and without gradients.
        temperature, softcap, logit_scale, backend, compute_dtype, memory_budget: of both sides, as
            in `linear_logprob`.

    Returns:
        `PreferenceLogratio`. If `weight` and `bias` of the policy need no gradient, [M, H] is kept
        for the backward, which is then a row scaling; otherwise it recomputes logit tiles.

    Raises:
        ValueError, TypeError: as `linear_logprob`, for either side; for `cu_seqlens` that do not
            rise from 0 to N or have an odd number of sequences, `places` that are not rows, and
            sums or weights of another shape.
    """
    check_tensors(policy.hidden, policy.weight, policy.targets, policy.bias)
    check_outputs(outputs, OUTPUTS)
    transform = resolve_transform(logit_scale, softcap, temperature)
    settings = resolve_settings(policy.hidden, backend, compute_dtype, memory_budget)
    num_places = check_sequences("policy", policy, cu_seqlens, token_weights)
    ref_sums, ref_arguments = reference_arguments(policy, reference, cu_seqlens, num_places)
    head_is_frozen = not (
        policy.weight.requires_grad or (policy.bias is not None and policy.bias.requires_grad)
    )
    found = preference_logratio_fwd(
        *policy,
        *ref_arguments,
        cu_seqlens,
        None if token_weights is None else token_weights.detach(),
        *transform,
        ",".join(name for name in OUTPUTS if name in outputs),
        torch.is_grad_enabled() and policy.hidden.requires_grad and head_is_frozen,
        *settings,
    )
    logps, ref_logps, num_tokens, logprob, entropy, squares, mean, top1 = found[:8]
    ref_logps = ref_logps.detach() if ref_sums is None else ref_sums.detach().to(logps)
    logratios = logps - ref_logps
    chosen, rejected = logratios.tensor_split(2)
    return PreferenceLogratio(
        logps,
        logps / num_tokens.clamp(min=1),
        ref_logps,
        logratios,
        chosen - rejected,
        num_tokens,
        logprob,
        entropy.detach() if "entropy" in outputs else None,
        squares.detach() if "log_sum_sq_probs" in outputs else None,
        mean.detach() if "mean_logits" in outputs else None,
        top1 if "is_top1" in outputs else None,
    )
