"""Fused post-training kernels: Triton on GPUs, C++ on CPUs, plain torch everywhere.

linear_logprob          log p(target) and statistics from hidden states and head, no [M, V] logits
linear_cross_entropy    the loss of the same head, with gradients computed in the forward
prefix_attention        packed attention over a forest of shared prefixes
linear                  a linear layer whose weight gradient is not slowed by packing on CPUs
rms_norm, swiglu        the element-wise chains of a transformer layer, one pass each
workspace_bytes         what an op allocates beyond its results, as a formula
reference               the specification of each, in plain torch
layers                  stateless modules for the Kernel Hub's `kernelize`
"""

from . import layers, reference
from ._cost import workspace_bytes
from .linear import linear
from .linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .linear_logprob import LinearLogprob, linear_logprob
from .prefix_attention import prefix_attention
from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = [
    "LinearCrossEntropy",
    "LinearLogprob",
    "layers",
    "linear",
    "linear_cross_entropy",
    "linear_logprob",
    "prefix_attention",
    "reference",
    "rms_norm",
    "swiglu",
    "workspace_bytes",
]
