"""The MLP of long rows in tiles of tokens: its [tokens, intermediate] never exists.

    y[i] = mlp(x[i])    dx[i], dW_i = vjp of mlp at x[i]    dW = sum of dW_i    i: a tile of tokens

An MLP acts on each token alone, so a tile is computed, written to its rows of y and forgotten. Kept
for the backward is x alone; there each tile is computed again with its graph, differentiated and
forgotten. Gradients of weights are summed over tiles in fp32, rounded once, and given to autograd
as one gradient: hooks on parameters (DDP, FSDP2, `optimizer_in_backward`) fire once. Memory falls
from 3 x [tokens, intermediate] in a gated MLP to that of a tile; what is computed is one forward of
the MLP more.

In a checkpointed layer it is not even that: x is saved before the MLP is computed, and where it is
the last thing saved in the layer (no norm follows the MLP) PyTorch's recomputation stops right
there. Then the tiles are the only recomputation, and tiling costs nothing.

The eager RMSNorm of transformers keeps an fp32 copy of its input and the normalised one, 6 bytes an
element in bf16 where a fused kernel keeps nothing but x. The norms of a layer and the last one are
tiled the same way where no fused kernel has taken their place.

The tile's forward is the module's own (fused, adapted, 4-bit). Hooks on the projections inside see
tiles, and see them again in the backward. Dropout draws the same numbers both times.

Source: "Arctic Long Sequence Training" (arXiv:2506.13996), section 3.3, where gradients of weights
are added tile by tile to `.grad` in its dtype.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from fastpost.adapted_layers import class_name
from fastpost.layers import GATED_MLPS, RMS_NORMS
from fastpost.sharding import decoder_layers

__all__ = ["TOKENWISE_MLPS", "tile", "tiled", "untile"]

_MODELS = "transformers.models."
TOKENWISE_MLPS = GATED_MLPS | {
    (_MODELS + "gemma2.modeling_gemma2", "Gemma2MLP"),
    (_MODELS + "gemma3.modeling_gemma3", "Gemma3MLP"),
    (_MODELS + "glm4.modeling_glm4", "Glm4MLP"),
    (_MODELS + "phi3.modeling_phi3", "Phi3MLP"),
}
"""(module, class) of MLPs whose output for a token depends on that token alone."""


def tile(model: Any, tokens: int) -> list[str]:
    """Lets the MLPs of `model` compute at most `tokens` tokens at a time, and its eager norms.

    Args:
        model: of transformers, PEFT's wrapper or not, after its layers were given fused forwards.
        tokens: at least 1; calls with no more run as before.

    Returns:
        Names of the modules that are tiled, as in `model.named_modules()`.

    Raises:
        ValueError: `tokens` is below 1, or a layer has another MLP (experts, whose tokens choose).
    """
    if tokens < 1:
        raise ValueError(f"mlp_tile_tokens must be at least 1, got {tokens}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        if class_name(mlp) not in TOKENWISE_MLPS:
            known = ", ".join(sorted(name for _, name in TOKENWISE_MLPS))
            raise ValueError(
                f"mlp_tile_tokens={tokens}: layer {index} of {type(base).__name__} has as mlp "
                f"{type(mlp).__name__}, of which it is not known that it acts on each token alone; "
                f"leave the option out. Known are {known}"
            )
    untile(model)  # of an earlier call
    chosen = {id(layer.mlp) for layer in layers}
    norms = [*(child for layer in layers for child in layer.children()), base.base_model.norm]
    chosen |= {
        id(norm)
        for norm in norms
        if class_name(norm) in RMS_NORMS and "forward" not in norm.__dict__
    }
    names = []
    for name, module in model.named_modules():
        if id(module) in chosen:
            module.__dict__["_untiled_forward"] = module.__dict__.get("forward")
            module.__dict__["_tile_tokens"] = tokens
            module.__dict__["forward"] = types.MethodType(_tiled_forward, module)
            names.append(name)
    return names


def untile(model: nn.Module) -> None:
    """Gives tiled modules back the forward they had."""
    for module in model.modules():
        if "_tile_tokens" in module.__dict__:
            own = module.__dict__.pop("_untiled_forward")
            del module.__dict__["forward"], module.__dict__["_tile_tokens"]
            if own is not None:
                module.__dict__["forward"] = own


def _tiled_forward(self: Any, x: Tensor) -> Tensor:
    own = self.__dict__["_untiled_forward"]
    run = own if own is not None else types.MethodType(type(self).forward, self)
    return tiled(run, self, x, self.__dict__["_tile_tokens"])


# Pickle stores a bound method as its name, to be looked up in the class on loading.
_tiled_forward.__name__ = "forward"


def tiled(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, tokens: int) -> Tensor:
    """`run(x)`, at most `tokens` tokens at a time.

    Args:
        run: maps [1, t, in] to [1, t, out], each of the t tokens alone, with weights of `module`.
        module: whose parameters get gradients.
        x: [..., in], floating.
        tokens: of a tile, at most; tiles are cut as equal as they can be.
    """
    rows = x.shape[:-1].numel()
    if rows <= tokens:
        return run(x)
    count = -(-rows // tokens)
    size = -(-rows // count)
    weights = _trained(module)
    if not (torch.is_grad_enabled() and (x.requires_grad or weights)):
        return _forward(run, x, size)
    # Saved before anything is computed: a recomputation that needs no more stops here.
    kept = _Keep.apply(x, torch.empty(0, device=x.device, requires_grad=True))
    result: Tensor = _Tiled.apply(run, module, size, kept, x, *weights)
    return result


def _trained(module: nn.Module) -> list[Tensor]:
    # Asked anew each time: FSDP2 puts gathered parameters in place of the sharded ones.
    return [p for p in module.parameters() if p.requires_grad]


def _forward(run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor | None = None
    for start in range(0, flat.shape[0], size):
        y = run(flat[None, start : start + size])
        if out is None:
            out = y.new_empty(flat.shape[0], y.shape[-1])
        out[start : start + size] = y[0]
    assert out is not None
    return out.view(*x.shape[:-1], out.shape[-1])


class _Keep(torch.autograd.Function):
    """Saves x; its node is where `_Tiled` finds it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, requiring: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return requiring.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None


class _Surroundings:
    """Random numbers and autocast as they are now, to be had again in the backward."""

    def __init__(self, x: Tensor) -> None:
        self.kind = x.device.type
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)
        self.random = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)

    def casting(self) -> Any:
        # Uncached: a cached cast of a weight belongs to the graph of the tile that made it.
        enabled, dtype = self.autocast
        return torch.autocast(self.kind, dtype=dtype, enabled=enabled, cache_enabled=False)

    def restore_random(self) -> None:
        torch.set_rng_state(self.random)
        set_device_states(self.devices, self.states, device_type=self.kind)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Any, module: nn.Module, size: int, kept: Tensor, x: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.run, ctx.module, ctx.size, ctx.kept = run, module, size, kept.grad_fn
        ctx.surroundings = _Surroundings(x)
        with ctx.surroundings.casting():
            return _forward(run, x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.kept.saved_tensors
        around, devices = ctx.surroundings, ctx.surroundings.devices
        weights = _trained(ctx.module)
        with torch.random.fork_rng(
            devices=devices, enabled=True, device_type=around.kind if devices else "cuda"
        ):
            around.restore_random()
            d_x, d_weights = _vjp(ctx, around, x, grad, weights)
        return None, None, None, None, d_x, *d_weights


def _vjp(
    ctx: Any, around: _Surroundings, x: Tensor, grad: Tensor, weights: list[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x, in its shape, and of the weights, in their dtypes."""
    needs_x = ctx.needs_input_grad[4]
    flat, d_y = x.detach().reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    d_flat = torch.empty_like(flat) if needs_x else None
    sums: list[Tensor | None] = [None] * len(weights)
    for start in range(0, flat.shape[0], ctx.size):
        rows = slice(start, start + ctx.size)
        with torch.enable_grad(), around.casting():
            part = flat[None, rows].requires_grad_(needs_x)
            y = ctx.run(part)
        asked = [part, *weights] if needs_x else weights
        found = list(torch.autograd.grad(y, asked, d_y[None, rows], allow_unused=True))
        if d_flat is not None:
            d_part = found.pop(0)
            d_flat[rows] = 0 if d_part is None else d_part[0]
            del d_part
        # each freed once it is added: the next tile needs its memory
        found.reverse()
        for i in range(len(weights)):
            d_weight = found.pop()
            if d_weight is not None:
                sums[i] = _add(sums[i], d_weight)
            del d_weight
        del part, y
    for i, weight in enumerate(weights):
        total = sums[i]
        sums[i] = None if total is None else total.to(weight.dtype)
        del total
    return None if d_flat is None else d_flat.view(x.shape), sums


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    if total is None:  # a copy: what autograd gives may be shared
        return term.to(torch.promote_types(term.dtype, torch.float32), copy=True)
    return total.add_(term)
