"""Rewards for RL training: callables `reward(prompts, completions, **columns)` in TRL's form.

Each returns one float a completion, or None where the row cannot be scored. Import what is needed
from its file: `maths`, `code`, `rules`, `judge`, `length`, `format`, `reasoning`.
"""
