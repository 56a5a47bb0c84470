"""The parser of commands that take a few flags and no recipe of a trainer's fields."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fastpost.cli.recipe import UsageError

__all__ = ["PlainParser"]


class PlainParser(argparse.ArgumentParser):
    """`argparse` whose mistakes end as those of every command do: one line, exit code 2.

    Args:
        command: what follows `fastpost`.
        description: what the command does.
        epilog: shown after the options as it is.
    """

    def __init__(self, command: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"fastpost {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def read(self, argv: list[str]) -> argparse.Namespace | None:
        """The arguments; None after help was asked for and printed.

        Raises:
            UsageError: unknown, missing or wrongly typed arguments.
        """
        if "-h" in argv or "--help" in argv:
            print(self.format_help().rstrip())
            return None
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
