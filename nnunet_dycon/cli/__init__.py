"""Command-line interface: the command `nnunet_dycon` with its sub-commands.

Only the sub-command that is run imports torch and nnU-Net, so --help is fast.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nnunet_dycon import __version__
from nnunet_dycon.cli import data, information, models, rounds, scores
from nnunet_dycon.errors import UserError
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.processes import exiting_on_sigterm

# Printed without arguments: the way from raw data to scores, as in the README.
FIRST_STEPS = f"""\
usage: nnunet_dycon COMMAND ...

Try it out on a small generated data set, in a few minutes on a CPU:
  nnunet_dycon demo -o demo

Let nnU-Net find the trainers:
  export nnUNet_extTrainer="$(nnunet_dycon trainers_path)"

Write labeled and unlabeled cases in nnU-Net's format (nnunet_dycon convert --help: other data sets, your own scans):
  nnunet_dycon convert la -i DOWNLOAD -d 101 --labeled 8
  nnUNetv2_plan_and_preprocess -d 101 -c 3d_fullres --verify_dataset_integrity

Check everything, and train (nnunet_dycon list: all trainers):
  nnunet_dycon doctor -d 101 -f all
  nnUNetv2_train 101 3d_fullres all -tr {RECOMMENDED}

Predict and score the test cases:
  nnUNetv2_predict -d 101 -c 3d_fullres -f all -tr {RECOMMENDED} -i IMAGES -o PREDICTIONS
  nnunet_dycon evaluate -ref LABELS -pred PREDICTIONS

All commands: nnunet_dycon --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnunet_dycon`, and return its exit code.

    Args:
        argv: the command-line arguments without the program name; None for sys.argv.

    Returns:
        0 for success, 1 for a problem in data or folders, 2 for wrong usage, 130 if interrupted, 141 if the output pipe
        was closed.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(FIRST_STEPS, end="", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names in another encoding, as on stderr
    try:
        arguments = build_parser(argv).parse_args(argv)
        with exiting_on_sigterm():
            return arguments.run(arguments) or 0
    except UserError as error:
        print(f"nnunet_dycon: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nnunet_dycon: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in: nnunet_dycon list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser(argv: Sequence[str] | None = ()) -> argparse.ArgumentParser:
    """Return the parser of all sub-commands.

    Each data set converter (`nnunet_dycon convert NAME`) defines its options in its own module. Importing all these
    modules would be slow, so the parser contains only the options of the converter named in ``argv``.

    Args:
        argv: the command-line arguments to be parsed, without the program name; None for the options of all converters.
    """
    about: dict[str, Any] = {
        "prog": "nnunet_dycon",
        "description": "Semi-supervised training for nnU-Net v2: learn from labeled and unlabeled 3D scans with "
        "nnU-Net's own commands. `nnunet_dycon COMMAND --help` explains a command, and `nnunet_dycon` without "
        "arguments prints the first steps.",
        "epilog": 'before training and prediction: export nnUNet_extTrainer="$(nnunet_dycon trainers_path)"',
    }
    overview = argparse.ArgumentParser(
        usage="nnunet_dycon [-h] [--version] [--print-completion SHELL] COMMAND ...", **about
    )
    parser = _Parser(overview, **about)
    for each in (overview, parser):
        each.add_argument("--version", action="version", version=f"nnunet_dycon {__version__}")
        each.add_argument(
            "--print-completion", action=_PrintCompletion, choices=("bash", "zsh", "fish", "tcsh"), metavar="SHELL",
            dest=argparse.SUPPRESS,
            help="print a script that completes commands and options in bash, zsh, fish or tcsh, and exit",
        )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser)
    groups: dict[str, tuple[Callable[[Any], None], ...]] = {
        "data": (partial(data.add_convert, argv=argv), data.add_preprocess_unlabeled, data.add_sparsify),
        "training": (information.add_trainers_path, information.add_list),
        "results": (
            scores.add_evaluate, scores.add_compare, models.add_predict_both, models.add_predict_uncertainty,
            models.add_export_vanilla,
        ),
        "annotation and self-training": (
            rounds.add_select, rounds.add_add_labels, rounds.add_pseudo_label, rounds.add_self_train,
        ),
        "help": (information.add_doctor, information.add_demo),
    }  # fmt: skip
    for title, add_commands in groups.items():
        group = _Group(commands, overview.add_argument_group(title))
        for add_command in add_commands:
            add_command(group)
    return parser


class _PrintCompletion(argparse.Action):
    """Action of --print-completion, which imports shtab and the modules of all converters only if it is used."""

    def __call__(self, parser, namespace, shell, option_string=None):
        import shtab

        print(shtab.complete(build_parser(None), shell))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Parser with the help of another one, because argparse cannot show sub-commands in groups."""

    def __init__(self, overview: argparse.ArgumentParser, **options: Any):
        super().__init__(**options)
        self._overview = overview

    def format_help(self) -> str:
        return self._overview.format_help()


class _Group:
    """Sub-commands that are shown in the same group of the overview."""

    def __init__(self, commands: Any, shown: Any):
        self._commands, self._shown = commands, shown

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        self._shown.add_argument(name, help=help)
        return self._commands.add_parser(name, help=help, **options)
