"""Every kernel on one device against the float64 reference: values, gradients, memory.

A result may be twice as wrong as the plain reference in the tested dtype, plus one rounding
(`fastpost_kernels.testing`). Reference and baseline run on the CPU, so that nothing of the device
is taken on trust. Inputs, results and scratch lie in guarded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import linear_cross_entropy, linear_logprob, prefix_attention, reference
from fastpost_kernels.testing import errors_and_limits

from .guarded_memory import GuardedMemory

__all__ = ["ON_GPU", "CheckResult", "Sizes", "run_checks"]

DTYPES = (torch.float32, torch.bfloat16)
TRANSFORM: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
MOMENTS = ("entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")
DIFFERENTIABLE = ("logprob", "entropy", "logsumexp")
LABEL_SMOOTHING, Z_LOSS = 0.1, 1e-3


@dataclass(frozen=True)
class Sizes:
    """Shapes of the checks. Rows and vocabulary are no multiples of a tile on purpose."""

    rows: int
    width: int  # a multiple of 32
    vocab: int
    memory_budget: int  # bytes; small enough for several tiles
    head_sizes: tuple[int, ...]
    heads: tuple[int, int]  # of queries and of keys
    segments: tuple[tuple[int, int, int], ...]
    window: int


ON_GPU = Sizes(
    rows=197,
    width=256,
    vocab=5003,
    memory_budget=1 << 20,
    head_sizes=(64, 96, 128, 192, 256),
    heads=(4, 2),
    # A tree of depth 3 with siblings, a segment of one token, and a root of its own.
    segments=(
        (0, 150, 301),
        (150, 230, 280),
        (230, 231, 280),
        (231, 280, 280),
        (280, 301, 301),
        (301, 389, 389),
    ),
    window=70,
)


@dataclass(frozen=True)
class CheckResult:
    """One line of the report: the result that came closest to its tolerance, or went past it."""

    op: str
    form: str
    dtype: str
    shape: str
    worst: str  # which result the two numbers below are of
    error: float  # relative, see `fastpost_kernels.testing`
    tolerance: float
    fault: str | None  # why the check failed

    @property
    def ok(self) -> bool:
        return self.fault is None


@dataclass(frozen=True)
class _Check:
    """`run(op, tensors)` returns named results, gradients among them, of either op."""

    op: str
    form: str
    dtype: torch.dtype
    shape: str
    tensors: dict[str, Tensor]
    trained: tuple[str, ...]  # tensors whose gradients are results too
    kernel: Callable[..., dict[str, Tensor]]
    specification: Callable[..., dict[str, Tensor]]
    differentiated: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()  # results that must be equal


def run_checks(
    device: str | torch.device, sizes: Sizes = ON_GPU, *, backend: str = "auto"
) -> Iterator[CheckResult]:
    """Yields one result a check, as each is done.

    Args:
        device: where the kernels run.
        sizes: shapes; the default is for GPUs.
        backend: as in the kernels; "triton" on "cpu" needs TRITON_INTERPRET=1.
    """
    for dtype in DTYPES:
        for check in (*_head_checks(dtype, sizes, backend), *_attention(dtype, sizes, backend)):
            yield _carry_out(check, torch.device(device))


def _head_checks(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[_Check]:
    generator = torch.Generator().manual_seed(1)
    normal = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((sizes.rows, sizes.width), (sizes.vocab, sizes.width), (sizes.vocab,))
    ]
    tensors = dict(zip(("hidden", "weight", "bias"), normal, strict=True))
    tensors["hidden"] *= 2 * sizes.width**-0.5
    best = reference.logits(*(x.double() for x in normal)).argmax(-1)
    targets = torch.randint(0, sizes.vocab, (sizes.rows,), generator=generator)
    targets[::4] = best[::4]
    targets[1::3] = -100
    tensors["targets"] = targets
    shape = f"M={sizes.rows} H={sizes.width} V={sizes.vocab}"
    every = ("hidden", "weight", "bias")
    # In bf16 the logits of a tile are rounded, and ties then decide which is the largest.
    exact = ("is_top1",) if dtype == torch.float32 else ()

    def logprob(**given: Any) -> dict[str, Tensor]:
        outputs = (*MOMENTS, *exact)
        budget = sizes.memory_budget
        found = linear_logprob(
            **given, **TRANSFORM, outputs=outputs, backend=backend, memory_budget=budget
        )
        return {name: x for name, x in found._asdict().items() if x is not None}

    def cross_entropy(budget: int | None, smoothing: float) -> Callable[..., dict[str, Tensor]]:
        def run(**given: Any) -> dict[str, Tensor]:
            found = linear_cross_entropy(
                **given,
                **TRANSFORM,
                label_smoothing=smoothing,
                z_loss=Z_LOSS,
                reduction="sum",
                backend=backend,
                memory_budget=budget,
            )
            return {"loss": found.loss}

        return run

    def true_logprob(**given: Any) -> dict[str, Tensor]:
        return reference.linear_logprob(**given, **TRANSFORM)

    def true_cross_entropy(smoothing: float) -> Callable[..., dict[str, Tensor]]:
        def run(**given: Any) -> dict[str, Tensor]:
            options = {**TRANSFORM, "label_smoothing": smoothing, "z_loss": Z_LOSS}
            return {"loss": reference.linear_cross_entropy(**given, **options)}

        return run

    forms: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("no gradient", (), ()),
        ("frozen head", ("hidden",), ("logprob",)),
        ("trained head", every, ("logprob",)),
        ("entropy, frozen head", ("hidden",), DIFFERENTIABLE),
        ("entropy, trained head", every, DIFFERENTIABLE),
    )
    for form, trained, differentiated in forms:
        yield _Check(
            "linear_logprob",
            form,
            dtype,
            shape,
            tensors,
            trained,
            logprob,
            true_logprob,
            differentiated,
            exact,
        )
    losses: tuple[tuple[str, tuple[str, ...], int | None, float], ...] = (
        ("frozen head", ("hidden",), sizes.memory_budget, 0.0),
        ("logits kept", every, None, LABEL_SMOOTHING),
        ("logits recomputed", every, sizes.memory_budget // 2, LABEL_SMOOTHING),
    )
    for form, trained, budget, smoothing in losses:
        yield _Check(
            "linear_cross_entropy",
            form,
            dtype,
            shape,
            tensors,
            trained,
            cross_entropy(budget, smoothing),
            true_cross_entropy(smoothing),
            ("loss",),
        )


def _attention(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[_Check]:
    segments = torch.tensor(sizes.segments)
    tokens = int(segments[-1, 1])
    query_heads, key_heads = sizes.heads
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "window, softcap, sinks": {"window": sizes.window, "softcap": 4.0},
    }
    for head_size in sizes.head_sizes:
        for form, options in forms.items():
            generator = torch.Generator().manual_seed(head_size)
            heads = {"query": query_heads, "key": key_heads, "value": key_heads}
            tensors = {
                name: torch.randn(tokens, count, head_size, generator=generator)
                .to(dtype)
                .transpose(0, 1)
                for name, count in heads.items()
            }
            if options:
                tensors["sinks"] = torch.randn(query_heads, generator=generator).to(dtype)

            def attend(options: Any = options, **given: Any) -> dict[str, Tensor]:
                out = prefix_attention(segments=segments, **given, **options, backend=backend)
                return {"out": out}

            def truly_attend(options: Any = options, **given: Any) -> dict[str, Tensor]:
                return {"out": reference.prefix_attention(segments=segments, **given, **options)}

            yield _Check(
                "prefix_attention",
                form,
                dtype,
                f"Hq={query_heads} Hk={key_heads} N={tokens} D={head_size}",
                tensors,
                tuple(tensors),
                attend,
                truly_attend,
                ("out",),
            )


def _carry_out(check: _Check, device: torch.device) -> CheckResult:
    truth = _results(check, check.specification, check.tensors, torch.float64)
    baseline = _results(check, check.specification, check.tensors, check.dtype)
    memory = GuardedMemory()
    try:
        given = {name: memory.guard(x.to(device)) for name, x in check.tensors.items()}
        with memory:
            actual = _results(check, check.kernel, given, check.dtype)
        actual = {name: x.cpu() for name, x in actual.items()}
        is_untouched = memory.is_untouched()
    except Exception as error:  # whatever a kernel raises is a finding, and the next check runs
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _report(check, "", float("nan"), 0.0, f"{type(error).__name__}: {first_line}")
    return _judge(check, actual, truth, baseline, is_untouched)


def _results(
    check: _Check,
    function: Callable[..., dict[str, Tensor]],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Results and gradients; the seed of each result is the same wherever it is computed."""
    leaves = {}
    for name, x in tensors.items():
        leaf = x.detach()
        if leaf.is_floating_point() and leaf.dtype != dtype:
            leaf = leaf.to(dtype)
        leaves[name] = leaf.requires_grad_(name in check.trained)
    found = function(**leaves)
    results = {name: x.detach() for name, x in found.items()}
    if not check.trained:
        return results
    outputs = tuple(found[name] for name in check.differentiated)
    seeds: list[Tensor] = []
    for index, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(100 + index)
        seed = torch.randn(output.shape, generator=generator).to(check.dtype)
        seeds.append(seed.to(output.device, output.dtype))
    grads = torch.autograd.grad(outputs, [leaves[name] for name in check.trained], seeds)
    names = (f"d {name}" for name in check.trained)
    return results | dict(zip(names, grads, strict=True))


def _judge(
    check: _Check,
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    baseline: dict[str, Tensor],
    is_untouched: bool,
) -> CheckResult:
    worst, error, tolerance, fault = "", 0.0, 1.0, None
    for name, got in actual.items():
        if name in check.exact:
            if not torch.equal(got, truth[name]):
                differ = int((got != truth[name]).sum())
                return _report(check, name, float(differ), 0.0, f"{name} differs in {differ} rows")
            continue
        if not bool(torch.isfinite(got).all()):
            fault = f"{name} holds NaN or infinity: unwritten, or read outside a buffer"
            return _report(check, name, float("nan"), tolerance, fault)
        for got_error, limit in errors_and_limits(got, truth[name], baseline[name], check.dtype):
            if not worst or got_error * tolerance > error * limit:
                worst, error, tolerance = name, got_error, limit
    if error > tolerance:
        fault = f"{worst} is further from the reference than the tolerance"
    if not is_untouched:
        fault = "wrote outside a buffer"
    return _report(check, worst, error, tolerance, fault)


def _report(
    check: _Check, worst: str, error: float, tolerance: float, fault: str | None
) -> CheckResult:
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[check.dtype]
    return CheckResult(check.op, check.form, dtype, check.shape, worst, error, tolerance, fault)
