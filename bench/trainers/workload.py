"""The work both trainers do: grade-school maths problems from reasoning-gym."""

from __future__ import annotations

import re
from typing import Any

import reasoning_gym


def maths_rows(num_rows: int, answers: str, seed: int = 11) -> list[dict[str, Any]]:
    """`gsm_symbolic` problems with the right solution and one whose numbers went wrong.

    Args:
        num_rows: rows to make.
        answers: "short" for the last line of the solution and the answer (about 25 tokens),
            "worked" for all of it (about 100 tokens).
        seed: of the problems.

    Returns:
        Rows with prompt, chosen and rejected as conversations of one message.
    """
    rows = []
    for item in reasoning_gym.create_dataset("gsm_symbolic", size=num_rows, seed=seed):
        lines = item["metadata"]["answer_cot"].split("####")[0].strip().splitlines()
        lines = lines[-1:] if answers == "short" else lines
        right = "\n".join([*lines, f"The answer is {item['answer']}."])
        rows.append(
            {
                "prompt": [{"role": "user", "content": item["question"]}],
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": _go_wrong(right)}],
            }
        )
    return rows


def _go_wrong(solution: str) -> str:
    """Every number from the middle on is off by three."""
    half = len(solution) // 2
    return solution[:half] + re.sub(r"\d+", lambda n: str(int(n[0]) + 3), solution[half:])


__all__ = ["maths_rows"]
