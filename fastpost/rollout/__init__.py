"""Rollouts: who samples the completions that an on-policy method learns from, and how faithfully.

`interface` is what a trainer asks for, `transformers_rollout` and `vllm_rollout` answer it,
`cast_copy` is the 16-bit model to sample from, `mismatch` measures what that difference costs.
"""
