"""The process behind `maths.MathsComparer`: one JSON question a line in, `true` or `false` out.

With `answer`, whether it equals `gold`; without, whether `gold` can be parsed. It ends when its
input does, so it cannot outlive the engine by more than one comparison; the CPU limit ends even a
comparison that never would.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import sys
from typing import Any

from math_verify import parse, verify

_CPU_SECONDS = 60  # for one answer; a worker whose engine has died ends by then
_COMMAND = re.compile(r"\\text\{[^}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")


def _parsed_gold(gold: str) -> list[Any]:
    """Gold comes as "$\\frac12$", "\\frac12", "2x+1" or "0.5"; prose must not parse."""
    if any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\[")):
        return parse(gold, parsing_timeout=None)
    # Undelimited LaTeX first as LaTeX: as plain text only the 3 of "3\\sqrt{2}" would be found.
    # A word outside a command means prose, which LaTeX would read as a product of letters.
    has_words = _WORD.search(_COMMAND.sub(" ", gold)) is not None
    found = [] if has_words else parse(f"${gold}$", parsing_timeout=None)
    return found or parse(gold, parsing_timeout=None)


def main() -> None:
    """Says `true` once loaded, then answers until the input ends."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    replies.write("true\n")
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + _CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        question = json.loads(line)
        try:
            gold = _parsed_gold(question["gold"])
            if "answer" in question:
                answer = parse(question["answer"], parsing_timeout=None)
                correct = bool(answer) and verify(gold, answer, timeout_seconds=None)
            else:
                correct = bool(gold)
        except (Exception, RecursionError):
            correct = False
        replies.write(json.dumps(bool(correct)) + "\n")


if __name__ == "__main__":
    main()
