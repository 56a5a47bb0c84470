"""What the demo leaves to be read: the closing table and the figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

STAGE_NAMES = {"before": "before training", "sft": "after SFT", "dpo": "after DPO"}
BLUE, ORANGE, GREY = "#2f6db3", "#d9722b", "#8c8c8c"


def table(metrics: dict[str, Any]) -> str:
    """The exam and the tokens saved, as lines of text."""
    num_problems = metrics["num_held_out_problems"]
    lines = [f"{'':<18}{f'right on {num_problems} held-out problems':>32}"]
    for stage, accuracy in metrics["accuracy"].items():
        lines.append(f"{STAGE_NAMES[stage]:<18}{accuracy:>32.1%}")
    held_out = _held_out(metrics["stages"]["dpo"]["log"])
    if held_out:
        last = held_out[-1]
        lines.append("")
        lines.append(
            f"held-out pairs after DPO: {last['eval_rewards/accuracies']:.1%} ranked right, "
            f"reward margin {last['eval_rewards/margins']:+.2f}"
        )
    for stage, figures in metrics["stages"].items():
        tokens = figures["tokens"]
        saved = 1 - tokens["unique_tokens"] / tokens["padded_tokens"]
        lines.append(
            f"{stage.upper()}: {tokens['padded_tokens']:,} padded tokens became "
            f"{tokens['unique_tokens']:,} ({saved:.0%} saved); {tokens['scored_tokens']:,} scored"
        )
    return "\n".join(lines)


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Loss, reward margin and accuracy side by side, saved as an image."""
    figure, (loss, margin, accuracy) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    _draw_loss(loss, metrics["stages"])
    _draw_margin(margin, metrics["stages"]["dpo"]["log"])
    _draw_accuracy(accuracy, metrics)
    figure.suptitle("fastpost demo: SmolLM2-135M learns to work sums step by step", fontsize=13)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_loss(axes: Axes, stages: dict[str, Any]) -> None:
    start = 0.0
    for (stage, figures), color in zip(stages.items(), (BLUE, ORANGE), strict=True):
        steps, losses = _series(figures["log"], "loss")
        axes.plot([start + step for step in steps], losses, color=color, label=stage.upper())
        start += steps[-1] if steps else 0
    axes.set(title="Training loss", xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_margin(axes: Axes, log: list[dict[str, float]]) -> None:
    axes.plot(*_series(log, "rewards/margins"), color=ORANGE, label="training pairs")
    steps, margins = _series(_held_out(log), "eval_rewards/margins")
    axes.plot(steps, margins, "o", color=BLUE, label="held-out pairs")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(
        title="DPO reward margin, right over wrong", xlabel="DPO step", ylabel="margin (nats×β)"
    )
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_accuracy(axes: Axes, metrics: dict[str, Any]) -> None:
    names = [STAGE_NAMES[stage].replace(" ", "\n", 1) for stage in metrics["accuracy"]]
    shares = list(metrics["accuracy"].values())
    bars = axes.bar(names, shares, color=[GREY, BLUE, ORANGE], width=0.6)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3)
    num_problems = metrics["num_held_out_problems"]
    axes.set(
        title=f"Right answers, {num_problems} held-out problems", ylabel="share", ylim=(0, 1.1)
    )
    _tidy(axes)


def _series(log: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _held_out(log: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in log if "eval_rewards/margins" in entry]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


__all__ = ["draw", "table"]
