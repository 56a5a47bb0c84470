"""A plan in words and as JSON. Memory and FLOPs are traced; times and money are predictions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastpost.planning.ledger import GRADIENTS, OPTIMIZER, PARAMETERS, REFERENCE
from fastpost.planning.roofline import Assumptions, Prediction
from fastpost.planning.trace import Traced

__all__ = ["as_dict", "checkpoint_bytes", "describe", "settings", "verdict"]

GIB = 2**30


def settings(traced: Traced) -> str:
    """The configuration in one line."""
    request = traced.request
    parts = [
        request.method,
        f"{request.num_gpus} x {request.gpu.name}",
        f"{request.rows} x {request.seq:,} tokens a GPU",
        f"adapter {request.adapter}" if request.adapter else "all weights",
        request.optimizer + (" in the backward" if request.optimizer_in_backward else ""),
        f"precision {request.precision}",
        ("checkpointing" if request.checkpointing else "no checkpointing")
        + (", offloaded" if request.offload else ""),
    ]
    if request.mlp_tile_tokens is not None:
        parts.append(f"MLPs in tiles of {request.mlp_tile_tokens:,} tokens")
    if request.samples:
        parts.append(f"rollouts from {request.rollout_dtype or 'the model'}")
    return ", ".join(parts)


def verdict(traced: Traced) -> str:
    """Whether it fits, in one line."""
    gpu, peak = traced.request.gpu, traced.peak.total
    fits = "fits" if traced.headroom >= 0 else "DOES NOT FIT"
    return (
        f"{fits}: predicted peak {peak / GIB:.1f} GiB of {gpu.usable / GIB:.1f} GiB per GPU, "
        f"headroom {traced.headroom / GIB:.1f} GiB"
    )


def checkpoint_bytes(traced: Traced) -> int:
    """Disk of one checkpoint: trained weights and, over all GPUs, the optimizer's states."""
    states = traced.at_rest.get(OPTIMIZER, 0) * traced.request.num_gpus
    return traced.trained_bytes + states


def describe(traced: Traced, predicted: Prediction, assumptions: Assumptions) -> str:
    """The plan as text of at most 100 columns."""
    request, gpu, peak = traced.request, traced.request.gpu, traced.peak
    lines = [
        f"{request.model}: {traced.num_parameters:,} parameters, {traced.num_trained:,} trained",
        settings(traced),
        "",
        verdict(traced),
        f"  at the peak ({peak.moment})",
    ]
    lines += [f"    {name:20}{size / GIB:9.2f} GiB" for name, size in peak.held.items()]
    shown = (PARAMETERS, GRADIENTS, OPTIMIZER, REFERENCE)
    rest = ", ".join(
        f"{name} {traced.at_rest[name] / GIB:.2f}" for name in shown if name in traced.at_rest
    )
    lines.append(f"  between steps (GiB): {rest}")
    if traced.host_bytes:
        host = traced.host_bytes * request.num_gpus / GIB
        lines.append(
            f"  pinned host memory: {traced.host_bytes / GIB:.1f} GiB per GPU, {host:.1f} in all"
        )
    if traced.sampled:
        lines.append(
            f"  a rollout: {request.rows * request.accumulation} completions per GPU at once, keys "
            f"and values {traced.sampled['cache_bytes'] / GIB:.2f} GiB"
        )
    lines += [
        f"  checkpoint on disk: {checkpoint_bytes(traced) / GIB:.1f} GiB each "
        f"(weights {traced.trained_bytes / GIB:.1f})",
        "",
        f"Traced: {traced.total_flops * request.accumulation / 1e12:,.1f} TFLOP per GPU and step"
        f" ({request.accumulation} batches)",
        f"Predicted step: {predicted.step:.2f} s, {predicted.tokens_per_second:,.0f} tokens/s"
        f" over {request.num_gpus} GPUs",
        f"  a batch: computing {predicted.compute:.3f} s, communicating {predicted.network:.3f} s;"
        f" optimizer {predicted.weights:.3f} s",
    ]
    if predicted.host:
        lines.append(f"  offloading {predicted.host:.3f} s a batch")
    if predicted.sampling:
        lines.append(f"  sampling {predicted.sampling:.2f} s a step, rewards apart")
    if predicted.gpu_hours is not None and predicted.dollars is not None:
        lines.append(
            f"  predicted for these tokens: {predicted.gpu_hours / request.num_gpus:,.1f} hours,"
            f" {predicted.gpu_hours:,.1f} GPU hours, ${predicted.dollars:,.0f}"
        )
    lines += [
        "  assumed, not measured: "
        f"{gpu.tflops:g} TFLOP/s x {assumptions.reached:g}, memory {gpu.bandwidth:g} GB/s,",
        f"    link {gpu.link:g} GB/s x {assumptions.link_reached:g}, overlap "
        f"{assumptions.overlap:g}, ${gpu.price:g} per GPU hour, "
        f"{gpu.reserve / GIB:g} GiB of {gpu.memory / GIB:g} not for tensors,",
        f"    host link {assumptions.host_link:g} GB/s",
    ]
    lines += [f"  fell back {count}x: {why}" for why, count in traced.fallbacks.items()]
    lines.append(f"Traced in {traced.seconds:.1f} s; all figures are predictions.")
    return "\n".join(lines)


def as_dict(traced: Traced, predicted: Prediction, assumptions: Assumptions) -> dict[str, Any]:
    """The plan for JSON, bytes and seconds as numbers."""
    request = traced.request
    return {
        "request": asdict(request) | {"adapter": str(request.adapter) if request.adapter else None},
        "fits": traced.headroom >= 0,
        "predicted_peak_bytes": traced.peak.total,
        "predicted_peak": {"moment": str(traced.peak.moment), "held": traced.peak.held},
        "headroom_bytes": traced.headroom,
        "at_rest_bytes": traced.at_rest,
        "host_bytes": traced.host_bytes,
        "rollout": traced.sampled,
        "checkpoint_bytes": checkpoint_bytes(traced),
        "parameters": traced.num_parameters,
        "trained_parameters": traced.num_trained,
        "flops_per_gpu_and_step": traced.total_flops * request.accumulation,
        "prediction": asdict(predicted),
        "assumptions": asdict(assumptions),
        "traced_seconds": traced.seconds,
    }
