"""Align diffusion models with SePPO. `seppo-fast COMMAND --help` shows the arguments of a command.

On several GPUs, DeepSpeed's launcher starts a process for each:
  deepspeed --module seppo_fast.train --config ds_a100.json --set seppo.data.source=PATH
and in the same way seppo_fast.evaluate and seppo_fast.profile_run.
"""

import argparse
import sys
from importlib import import_module

from seppo_fast import __version__

# Command -> its module, the arguments that are added, and what it does.
COMMANDS = {
    "train": ("seppo_fast.train", [], "train a model, or go on with a run"),
    "plan": ("seppo_fast.train", ["--dry-run"], "check a configuration and print batch, memory and hours; train nothing"),
    "profile": ("seppo_fast.profile_run", [], "train for a few updates and show where the time goes"),
    "evaluate": ("seppo_fast.evaluate", [], "draw samples by several models, score them and compare"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit status of the command that the first argument names; all other arguments are its own."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="seppo-fast", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"seppo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, _, does) in COMMANDS.items():
        commands.add_parser(name, help=does, add_help=False)
    name = parser.parse_args(argv[:1]).command
    module, added, _ = COMMANDS[name]
    return import_module(module).main([*argv[1:], *added], prog=f"seppo-fast {name}")


if __name__ == "__main__":
    sys.exit(main())
