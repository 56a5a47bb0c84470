"""What `filter_eps` drops and what that costs: `python -m bench.ops.bench_gradient_filtering`.

No speed is measured here: a share of skipped columns is the same on every machine, and the GEMMs of
d hidden and d weight shrink by it. Three inputs, each M rows under a vocabulary of SmolLM2's size:

    text      hidden states and head of SmolLM2-135M-Instruct on Python's own documentation
    peaked    random logits of standard deviation 6: a few tokens hold each row's probability, but
              other ones in every row, so that few columns are free of them
    flat      random logits of standard deviation 0.5, the usual inputs of kernel benchmarks: no
              token but the target passes 2^-12, so that everything is skipped; and a random head
              averages to nothing, so that this costs little

Only the first says anything about training.

Errors are of d hidden and d weight of the mean negative log-prob, relative in norm, against fp32
without a filter. The line without a filter in bf16 says what rounding alone costs. Blocks of
128 x 256 are what the paper skips (arXiv:2411.09009, section 4.3; it sorts the vocabulary first).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastpost_kernels import _vocab_gradients, linear_logprob

__all__ = ["Problem", "Shares", "main", "measure", "random_problem", "text_problem"]

THRESHOLDS = (2.0**-10, 2.0**-12, 2.0**-14)
BLOCK_ROWS, BLOCK_COLS = 128, 256


class Problem(NamedTuple):
    hidden: Tensor  # [M, H] fp32
    weight: Tensor  # [V, H] fp32
    targets: Tensor  # [M]


class Shares(NamedTuple):
    """Errors of two gradients, and the shares of columns and of blocks that are skipped."""

    error_hidden: float
    error_weight: float
    columns: float
    blocks: float


def text_problem(rows: int) -> Problem:
    """The last hidden states of the model over consecutive texts of 512 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpost.demo.smollm2 import smollm2_path

    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 12 * rows + 1000], return_tensors="pt").input_ids[:, : rows + 1]
    with torch.no_grad():
        parts = [model.model(ids[:, i : i + 512]) for i in range(0, rows, 512)]
    hidden = torch.cat([part.last_hidden_state[0] for part in parts])[:rows]
    return Problem(hidden.float(), model.lm_head.weight.detach().float(), ids[0, 1:])


def random_problem(rows: int, deviation: float, width: int = 576, vocab: int = 49_152) -> Problem:
    """Normal logits of the given standard deviation, targets drawn from what they say."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator) * deviation / width**0.5
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.cat(
        [
            torch.multinomial((part @ weight.T).softmax(-1), 1, generator=generator)[:, 0]
            for part in hidden.split(256)
        ]
    )
    return Problem(hidden, weight, targets)


def gradients(problem: Problem, dtype: torch.dtype, eps: float | None) -> tuple[Tensor, Tensor]:
    hidden = problem.hidden.to(dtype).requires_grad_()
    weight = problem.weight.to(dtype).requires_grad_()
    logprob = linear_logprob(hidden, weight, problem.targets, filter_eps=eps).logprob
    d_hidden, d_weight = torch.autograd.grad(-logprob.mean(), [hidden, weight])
    return d_hidden.float(), d_weight.float()


def measure(problem: Problem, dtype: torch.dtype, eps: float | None, truth: list[Tensor]) -> Shares:
    """`truth`: the two gradients in fp32 without a filter."""
    seen = []
    significant_columns = _vocab_gradients.significant_columns

    def watch(head: object, tile: Tensor, factors: Tensor) -> Tensor | None:
        columns = significant_columns(head, tile, factors)
        kept = tile.shape[1] if columns is None else columns.numel()
        seen.append((tile.numel(), tile.shape[0] * kept, _skipped_blocks(tile, factors)))
        return columns

    with patch.object(_vocab_gradients, "significant_columns", watch):
        found = gradients(problem, dtype, eps)
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]
    total = sum(numel for numel, _, _ in seen) or 1
    columns = sum(numel - kept for numel, kept, _ in seen) / total
    return Shares(*errors, columns, sum(numel * share for numel, _, share in seen) / total)


def _skipped_blocks(tile: Tensor, factors: Tensor) -> float:
    small = (tile.abs() * factors[:, None]) <= 1
    skipped = [
        block.all() for rows in small.split(BLOCK_ROWS) for block in rows.split(BLOCK_COLS, dim=1)
    ]
    return float(torch.stack(skipped).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--inputs", nargs="+", default=["text", "peaked", "flat"])
    args = parser.parse_args()
    makers = {
        "text": lambda: text_problem(args.rows),
        "peaked": lambda: random_problem(args.rows, 6.0),
        "flat": lambda: random_problem(args.rows, 0.5),
    }
    print(f"{args.rows} rows; errors relative to fp32 without a filter; shares that are skipped")
    print("input    dtype     filter   error d hidden  error d weight  columns  blocks 128x256")
    for name in args.inputs:
        problem = makers[name]()
        truth = list(gradients(problem, torch.float32, None))
        runs = [(torch.bfloat16, None), *((torch.float32, eps) for eps in THRESHOLDS)]
        for dtype, eps in [*runs, (torch.bfloat16, THRESHOLDS[1])]:
            found = measure(problem, dtype, eps, truth)
            threshold = "none" if eps is None else f"2^{torch.tensor(eps).log2().int()}"
            print(
                f"{name:8} {str(dtype)[6:]:9} {threshold:8} {found.error_hidden:14.3%}  "
                f"{found.error_weight:14.3%}  {found.columns:7.1%}  {found.blocks:14.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
