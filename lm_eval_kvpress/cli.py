"""The command line: `lm-eval-kvpress COMMAND ...`, the same as `python -m lm_eval_kvpress COMMAND ...`.

Thin: a table of commands, each imported when it is called, so that `--help` loads neither torch nor lm-eval.
A command is a function that takes the arguments after its name and returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval_kvpress import __version__
from lm_eval_kvpress.errors import UsageError, one_line
from lm_eval_kvpress.harness.argument_names import check_command_line, option
from lm_eval_kvpress.harness.command_line import discard_output, open_output
from lm_eval_kvpress.presses.suggest import near

BAD_INPUT = 2  # the exit status that argparse uses
INTERRUPTED = 130  # the exit status that a shell gives to Ctrl-C


@dataclass(frozen=True)
class Command:
    target: str  # "module:function", imported when the command is called
    help: str
    takes_model_args: bool = False  # whose names are checked before the target is imported, and torch with it


COMMANDS = {
    "run": Command("lm_eval_kvpress.cli:run", "evaluate: lm-eval's own `run`, our models and tasks entered"),
    "verify": Command(
        "lm_eval_kvpress.verify.command:main", "check a checkpoint: are compressed caches scored correctly?", True
    ),
    "sweep": Command(
        "lm_eval_kvpress.sweep.command:main", "evaluate many presses and ratios at once, from one prefill", True
    ),
    "calibrate": Command(
        "lm_eval_kvpress.calibrate.command:main", "take the statistics of a model that some presses need"
    ),
    "report": Command(
        "lm_eval_kvpress.report.command:main", "compare results: a leaderboard as a page, a text, or data"
    ),
    "presses": Command(
        "lm_eval_kvpress.presses.command:main", "list the presses, or show one: arguments, needs, paper"
    ),
    "builtin": Command("lm_eval_kvpress.cli:builtin", "print the folder of the built-in checkpoint"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Call one command. What a user can mend or did is one line on stderr; a defect keeps its traceback."""
    open_output()
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command not in COMMANDS:
        hint = near(args.command, COMMANDS)
        parser.error(f"unknown command {args.command!r}; {hint}commands: {', '.join(COMMANDS)}")
    command = COMMANDS[args.command]
    module, _, function = command.target.partition(":")
    try:
        if command.takes_model_args:
            check_command_line(args.arguments)
        status: int = getattr(importlib.import_module(module), function)(args.arguments)
        sys.stdout.flush()  # a full or closed standard output shows here, or at the end of Python as a traceback
    except (UsageError, OSError, KeyboardInterrupt) as error:
        if (line := one_line(error)) is None:
            raise
        discard_output()
        print(f"{parser.prog} {args.command}: {line}", file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else BAD_INPUT
    return status


def run(arguments: Sequence[str]) -> int:
    """lm-eval's command line, after our models and tasks were entered explicitly, start-up file or not."""
    from lm_eval_kvpress.harness import plugin

    if option(arguments, "--model") in plugin.MODELS:
        check_command_line(arguments)
    from lm_eval.__main__ import cli_evaluate

    plugin.register_models()
    plugin.include_tasks()
    plugin.check_arguments()
    argv = sys.argv
    sys.argv = ["lm_eval", "run", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = argv
    return 0


def builtin(arguments: Sequence[str]) -> int:
    """Print where the built-in checkpoint lies, for programs that know nothing of ``pretrained=builtin``."""
    from lm_eval_kvpress.harness.checkpoint import BUILTIN, resolve_pretrained

    argparse.ArgumentParser(prog="lm-eval-kvpress builtin", description=builtin.__doc__).parse_args(arguments)
    print(resolve_pretrained(BUILTIN))
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress",
        description="Honest evaluation of KV-cache compression with lm-evaluation-harness and kvpress.",
        epilog=f"commands:\n{listing}\n\nEach takes --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    return parser
