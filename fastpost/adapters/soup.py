"""Models averaged in weight space, streamed: soups, interpolation, task arithmetic.

    uniform     mean of the models
    linear      (1 - t) first + t second
    spherical   the same along the arc between them, tensor by tensor
    task        base + sum of factor_i (model_i - base)

Sums are in float32, rounded once. Sources: soups, Wortsman et al., "Model soups"
(arXiv:2203.05482), uniform and greedy (recipe 1); task arithmetic, Ilharco et al.
(arXiv:2212.04089), equation 1; spherical interpolation, Shoemake, SIGGRAPH 1985.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastpost.adapters.weight_files import WeightFolder, staged, write_like

__all__ = ["greedy_soup", "interpolate", "task_arithmetic", "uniform_soup"]


def uniform_soup(folders: Sequence[str | Path], output: str | Path) -> None:
    """Write the mean of the models in `folders`, with the files of the first.

    Raises:
        ValueError: fewer than two folders, models that differ in names or shapes, `output` exists.
    """
    models = _open(folders)
    count = len(models)
    _write(
        models, output, lambda tensors: sum((t.float() for t in tensors), torch.zeros(())) / count
    )


def greedy_soup(
    folders: Sequence[str | Path], output: str | Path, evaluate: Callable[[str], float]
) -> list[str]:
    """Add models to the mean in order of their own score, keeping each that does not lower it.

    Args:
        evaluate: a folder's score, higher is better; called once for each model and each mean.

    Returns:
        The folders that made it into the soup, best first.

    Raises:
        ValueError: as `uniform_soup`.
    """
    names = [str(folder) for folder in folders]
    _open(names)
    scores = {name: evaluate(name) for name in names}
    ranked = sorted(names, key=lambda name: -scores[name])
    kept, best = ranked[:1], scores[ranked[0]]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for name in ranked[1:]:
        with tempfile.TemporaryDirectory(dir=Path(output).parent) as scratch:
            trial = Path(scratch, "soup")
            uniform_soup([*kept, name], trial)
            score = evaluate(str(trial))
        if score >= best:
            kept, best = [*kept, name], score
    if len(kept) == 1:
        with staged(output) as folder:
            write_like(WeightFolder(kept[0]), folder, lambda _, tensor: tensor)
    else:
        uniform_soup(kept, output)
    return kept


def interpolate(
    first: str | Path, second: str | Path, output: str | Path, *, t: float, spherical: bool = False
) -> None:
    """Write the model a share `t` of the way from `first` to `second`.

    Raises:
        ValueError: as `uniform_soup`; `t` outside [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}")

    def between(tensors: Sequence[Tensor]) -> Tensor:
        a, b = (tensor.float() for tensor in tensors)
        return _slerp(a, b, t) if spherical else torch.lerp(a, b, t)

    _write(_open([first, second]), output, between)


def task_arithmetic(
    base: str | Path, folders: Sequence[str | Path], factors: Sequence[float], output: str | Path
) -> None:
    """Write base + sum of factor (model - base): add skills, or take them away (factor < 0).

    Raises:
        ValueError: as `uniform_soup`; not one factor a folder.
    """
    if len(factors) != len(folders):
        raise ValueError(f"expected {len(folders)} factors, one a folder, got {len(factors)}")

    def combined(tensors: Sequence[Tensor]) -> Tensor:
        start = tensors[0].float()
        moves = zip(factors, tensors[1:], strict=True)
        return start + sum(factor * (tensor.float() - start) for factor, tensor in moves)

    _write(_open([base, *folders]), output, combined)


def _slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Along the arc; straight where the two are nearly parallel and the arc has no plane."""
    lengths = a.norm() * b.norm()
    cosine = (a * b).sum() / lengths if lengths > 0 else torch.ones(())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, t)
    weights = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
    return weights[0] * a + weights[1] * b


def _open(folders: Sequence[str | Path]) -> list[WeightFolder]:
    if len(folders) < 2:
        raise ValueError(f"expected at least two models, got {len(folders)}")
    models = [WeightFolder(folder) for folder in folders]
    for model in models[1:]:
        differing = sorted(set(models[0].shard_of) ^ set(model.shard_of))
        if differing:
            raise ValueError(
                f"{models[0].folder} and {model.folder} are not the same architecture: only one "
                f"of them has {differing[0]!r}"
            )
    return models


def _write(
    models: Sequence[WeightFolder],
    output: str | Path,
    combine: Callable[[Sequence[Tensor]], Tensor],
) -> None:
    def make(name: str, first: Tensor) -> Tensor:
        tensors = [first, *(model.read(name) for model in models[1:])]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"{name} has different shapes in the models: {sorted(shapes)}")
        return combine(tensors).to(first.dtype) if first.is_floating_point() else first

    with staged(output) as folder:
        write_like(models[0], folder, make)
