"""From scored completions to what PPO learns from: token rewards, advantages, minibatches.

    r_t = −β k1_t + [t is the last token] · score,    whitened over the rollout if asked
    A, R = GAE(r, V),    A whitened over the rollout

Whitening and every count look at all ranks. A minibatch is the rows of one optimizer step; it is
learnt from in micro-batches, so a micro-batch carries the minibatch's count of tokens.
Legend: B completions of this rank, C tokens, E epochs, M minibatches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpost.losses import gae, kl_penalised_rewards, whiten
from fastpost.losses.sequence import token_mean
from fastpost.ppo.completions import Batch

# Of a stored rollout; not of its micro-batches.
NUM_TOKENS = "num_tokens"


def whiten_across_ranks(accelerator: Any, values: Tensor, mask: Tensor) -> Tensor:
    """`[B, C]`: mean 0 and variance 1 over the scored tokens of all ranks."""
    if accelerator.num_processes == 1:
        return whiten(values, mask)
    rows, width = values.shape
    everywhere = [
        accelerator.gather(accelerator.pad_across_processes(tensor, dim=1, pad_index=0))
        for tensor in (values, mask.int())
    ]
    whitened = whiten(everywhere[0], everywhere[1].bool())
    first = accelerator.process_index * rows
    return whitened[first : first + rows, :width]


def experience(
    accelerator: Any,
    batch: Batch,
    old_logps: Tensor,  # [B, C]
    old_values: Tensor,  # [B, C]
    scores: Tensor,  # [B]
    kl: Tensor,  # [B, C]
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> Batch:
    """The batch with `old_logps`, `old_values`, `advantages` and `returns`, all `[B, C]`."""
    mask = batch["response_mask"]
    rewards = kl_penalised_rewards(scores, kl, mask, beta=kl_coef)
    if whiten_rewards:
        # the scale only: the mean says whether completions are good
        count, total = mask.sum(), rewards.sum()
        count, total = (accelerator.reduce(t.double(), "sum") for t in (count, total))
        mean = (total / count.clamp(min=1)).to(rewards.dtype)
        rewards = (whiten_across_ranks(accelerator, rewards, mask) + mean).masked_fill(~mask, 0.0)
    advantages, returns = gae(rewards, old_values, mask, gamma=gamma, gae_lambda=lam)
    return batch | {
        "old_logps": old_logps,
        "old_values": old_values,
        "advantages": whiten_across_ranks(accelerator, advantages, mask),
        "returns": returns,
    }


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`[]`: 1 − var(R − V) / var(R) over scored tokens; 0 where the returns do not vary."""

    def variance(of_tokens: Tensor) -> Tensor:
        return token_mean((of_tokens - token_mean(of_tokens, mask)).square(), mask)

    spread = variance(returns)
    return torch.where(spread > 0, 1 - variance(returns - values) / spread.clamp(min=1e-12), 0.0)


class MinibatchOrder:
    """Which rows of a rollout each forward learns from: a new order of prompts every epoch.

    Args:
        rows: completions of a rollout on this rank.
        group: completions of a prompt, which stay together.
        epochs: passes over a rollout.
        mini_batches: optimizer steps of a pass.
        micro_batches: forwards of an optimizer step.
        seed: of the order, this rank's own.
    """

    def __init__(
        self, rows: int, group: int, epochs: int, mini_batches: int, micro_batches: int, seed: int
    ) -> None:
        self.forwards = epochs * mini_batches * micro_batches
        self._rows, self._group, self._seed = rows, group, seed
        self._epochs, self._mini_batches, self._micro_batches = epochs, mini_batches, micro_batches

    def row_order(self, rollout: int, epoch: int) -> Tensor:
        """`[B]` int64: the rows in the order of this epoch over this rollout."""
        seed = (self._seed * 1_000_003 + rollout) * 1_009 + epoch
        generator = torch.Generator().manual_seed(seed % 2**63)
        prompts = torch.randperm(self._rows // self._group, generator=generator)
        return (prompts[:, None] * self._group + torch.arange(self._group)).flatten()

    def count_tokens(self, accelerator: Any, rollout: int, mask: Tensor) -> Tensor:
        """`[E, M]` int64: scored tokens of each minibatch over all ranks."""
        lengths = mask.sum(dim=1)
        counts = torch.stack(
            [
                lengths[self.row_order(rollout, epoch).to(mask.device)]
                .view(self._mini_batches, -1)
                .sum(dim=1)
                for epoch in range(self._epochs)
            ]
        )
        return accelerator.reduce(counts, "sum")

    def micro_batch(self, stored: Batch, step: int) -> Batch:
        """Rows and `num_items` `[]` of forward `step`, counted from the start of training."""
        rollout, forward = divmod(step, self.forwards)
        epoch, within = divmod(forward, self._mini_batches * self._micro_batches)
        size = self._rows // (self._mini_batches * self._micro_batches)
        order = self.row_order(rollout, epoch).to(stored["input_ids"].device)
        rows = order[within * size : (within + 1) * size]
        batch = {name: tensor[rows] for name, tensor in stored.items() if name != NUM_TOKENS}
        num_items = stored[NUM_TOKENS][epoch, within // self._micro_batches]
        return batch | {"num_items": num_items}


__all__ = [
    "NUM_TOKENS",
    "MinibatchOrder",
    "experience",
    "explained_variance",
    "whiten_across_ranks",
]
