"""The console script `fastpost`: picks the command and turns mistakes into one line and a code.

Exit codes: 0 done, 2 a mistake in the recipe, the flags or the data, 130 interrupted. Any other
failure keeps its traceback. Commands are imported when they are called, so that `fastpost --help`
answers at once: their own imports of torch and TRL take seconds.
"""

from __future__ import annotations

import importlib
import sys

import fastpost
from fastpost.cli.recipe import UsageError, did_you_mean

COMMANDS = {
    "sft": "supervised fine-tuning on texts, conversations or prompt-completion pairs",
    "dpo": "preference training on chosen and rejected answers",
    "kto": "preference training on single judged answers",
    "orpo": "preference training in one stage, without a reference model",
    "cpo": "CPO and SimPO, preference training without a reference model",
    "reward": "a reward model from preferences",
    "grpo": "reinforcement learning on groups of answers, with rewards by name or function",
    "rloo": "reinforcement learning with a leave-one-out baseline",
    "ppo": "proximal policy optimisation with a value head and a KL penalty",
    "merge": "an adapter into weights, or several models into one",
    "export": "a sharded checkpoint into a folder that transformers or PEFT loads",
    "decontaminate": "training rows without what the evaluation sets hold",
    "mix": "one file of rows from several sources, and what it holds",
    "synthesise": "training rows made by a model: magpie, teacher, or rejection sampling",
    "doctor": "what this machine offers; --gpu checks its kernels, data FILE training data",
    "plan": "whether a run fits your GPUs, how fast and how much, predicted without one",
    "run": "every stage of a recipe: data, training, alignment, evaluation, export",
    "report": "one page about a run: curves, health, evaluation, samples, cost",
    "tune": "measure which kernels are faster on this GPU, and use those",
    "demo": "train a small model on this machine and see what it learnt",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. `argv`: the arguments after the program's name; default `sys.argv[1:]`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"fastpost {fastpost.__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
        print(f"fastpost: error: unknown command '{name}'.{hint}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"fastpost.cli.{name}")
    try:
        return command.main(rest)
    except UsageError as error:
        print(f"fastpost {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastpost {name}: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    commands = "\n".join(f"  {name:15}{text}" for name, text in COMMANDS.items())
    return (
        "usage: fastpost COMMAND [options]\n\n"
        f"commands:\n{commands}\n\n"
        "  fastpost COMMAND --help  shows a command's options\n"
        "  fastpost --version       shows the version"
    )


if __name__ == "__main__":
    sys.exit(main())
