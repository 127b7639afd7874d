# SPDX-License-Identifier: Apache-2.0
"""The ``moefold`` command.

A subcommand is one entry of :data:`COMMANDS`: a function that adds its arguments to a parser, and one that runs it.
Each lives with what it serves, so that this file stays a list.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_moefold import calibrate
from lightning_moefold.planner import command as plan_command
from lightning_moefold.plots import command as plot_command


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        help: One line.
        configure: Adds its arguments.
        run: Runs it and returns the exit status.
    """

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: dict[str, Command] = {
    "calibrate": Command("measure this machine for the planner", calibrate.configure, calibrate.run),
    "plan": Command("rank the folds of a model on a machine", plan_command.configure, plan_command.run),
    "plot": Command("draw the loss, speed, memory and expert load of a run", plot_command.configure, plot_command.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``moefold``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="moefold", description="MoE Parallel Folding for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.configure(commands.add_parser(name, help=command.help, description=command.help.capitalize() + "."))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except ValueError as error:
        print(f"moefold {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
