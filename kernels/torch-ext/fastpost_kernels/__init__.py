"""Fused post-training kernels: Triton on GPUs, C++ on CPUs, plain torch everywhere.

linear_logprob          log p(target) and statistics from hidden states and head, no [M, V] logits
vocab_parallel_logprob  the same where each process of a group holds a part of the vocabulary
preference_logratio     sequence log-probs of policy and reference, their log-ratios and margins
linear_cross_entropy    the loss of the same head, with gradients computed in the forward
prefix_attention        packed attention over a forest of shared prefixes
lora_linear, dora_linear   a linear layer and its low-rank adapter, fused; DoRA's factored norm
nf4_linear              the same on a 4-bit NormalFloat weight, byte for byte bitsandbytes'
linear                  a linear layer whose weight gradient is not slowed by packing on CPUs
adamw_8bit_, AdamW8bit  AdamW with 8-bit states: many tensors in one launch, stochastic rounding
rms_norm, swiglu        the element-wise chains of a transformer layer, one pass each
workspace_bytes         what an op allocates beyond its results, as a formula
reference               the specification of each, in plain torch
layers                  stateless modules for the Kernel Hub's `kernelize`
"""

from . import layers, reference
from ._cost import workspace_bytes
from ._nf4_format import Nf4Weight
from .adamw_8bit import AdamWState, adamw_8bit_, adamw_state
from .adamw_8bit_optimizer import AdamW8bit
from .dora_linear import dora_linear, dora_weight_norm, row_square_norms
from .linear import linear
from .linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .linear_logprob import LinearLogprob, LoraHead, linear_logprob
from .lora_linear import LoraWeights, lora_linear, lora_linears
from .nf4_linear import nf4_dequantize, nf4_linear, nf4_quantize
from .preference_logratio import HeadRows, PreferenceLogratio, preference_logratio
from .prefix_attention import prefix_attention
from .rms_norm import rms_norm
from .swiglu import swiglu
from .vocab_parallel_logprob import VocabParallelLogprob, vocab_parallel_logprob

__all__ = [
    "AdamW8bit",
    "AdamWState",
    "HeadRows",
    "LinearCrossEntropy",
    "LinearLogprob",
    "LoraHead",
    "LoraWeights",
    "Nf4Weight",
    "PreferenceLogratio",
    "VocabParallelLogprob",
    "adamw_8bit_",
    "adamw_state",
    "dora_linear",
    "dora_weight_norm",
    "layers",
    "linear",
    "linear_cross_entropy",
    "linear_logprob",
    "lora_linear",
    "lora_linears",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "preference_logratio",
    "prefix_attention",
    "reference",
    "rms_norm",
    "row_square_norms",
    "swiglu",
    "vocab_parallel_logprob",
    "workspace_bytes",
]
