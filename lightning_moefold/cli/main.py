# SPDX-License-Identifier: Apache-2.0
"""The ``moefold`` command.

A subcommand is one entry of :data:`COMMANDS`: a function that adds its arguments to a parser, and one that runs it.
Each lives with what it serves, so that this file stays a list. Those of :data:`TRAINER_COMMANDS` are LightningCLI's,
which reads its arguments itself and takes seconds to import; so does ``data``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_moefold.cli import evaluate as eval_command
from lightning_moefold.cli import plan as plan_command
from lightning_moefold.cli import plot as plot_command
from lightning_moefold.models import export
from lightning_moefold.planner.machine import calibrate
from lightning_moefold.testing import verification as verify_command


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
    "eval": Command("run tasks of lm-eval on a checkpoint", eval_command.configure, eval_command.run),
    "export": Command("write a checkpoint of a run as a Hugging Face directory", export.configure, export.run),
    "plan": Command("rank the folds of a model on a machine", plan_command.configure, plan_command.run),
    "plot": Command("draw the loss, speed, memory and expert load of a run", plot_command.configure, plot_command.run),
    "verify": Command(
        "check that a fold computes what one process computes", verify_command.configure, verify_command.run
    ),
}

TRAINER_COMMANDS: dict[str, str] = {
    "fit": "train",
    "validate": "measure the loss on the validation text",
    "test": "measure the loss on the test text",
    "predict": "write the loss of every document",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``moefold``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="moefold", description="MoE Parallel Folding for PyTorch Lightning.")
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    if arguments_given and arguments_given[0] in TRAINER_COMMANDS:
        from lightning_moefold.cli import fit as trainer_command

        return trainer_command.run(arguments_given[0], arguments_given[1:])
    if arguments_given and arguments_given[0] == "data":
        from lightning_moefold.cli import data as data_command

        return data_command.run(arguments_given[1:])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.configure(commands.add_parser(name, help=command.help, description=command.help.capitalize() + "."))
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (moefold {name} --help)")
    commands.add_parser("data", help="show what a run will be trained on (moefold data preview --help)")
    arguments = parser.parse_args(arguments_given)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except BrokenPipeError:
        return 1
    except (ValueError, OSError) as error:
        print(f"moefold {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
