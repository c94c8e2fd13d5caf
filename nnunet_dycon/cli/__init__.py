"""Command-line interface: the command `nnunet_dycon` with its sub-commands.

Only the sub-command that is run imports torch and nnU-Net, so --help is fast.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from nnunet_dycon import __version__
from nnunet_dycon.cli import data, information, models, pretraining, rounds, scores
from nnunet_dycon.errors import UserError
from nnunet_dycon.system.processes import exiting_on_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnunet_dycon`, and return its exit code.

    Args:
        argv: the command-line arguments without the program name; None for sys.argv.

    Returns:
        0 for success, 1 for a problem in data or folders, 2 for wrong usage, 130 if interrupted, 141 if the output pipe
        was closed.
    """
    argv = sys.argv[1:] if argv is None else argv
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


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all sub-commands.

    Each data set converter (`nnunet_dycon convert NAME`) defines its options in its own module. Importing all these
    modules would be slow, so the parser contains only the options of the converter named in ``argv``.

    Args:
        argv: the command-line arguments to be parsed, without the program name.
    """
    parser = argparse.ArgumentParser(
        prog="nnunet_dycon",
        description="Semi-supervised training for nnU-Net v2.",
        epilog='Before nnUNetv2_train: export nnUNet_extTrainer="$(nnunet_dycon trainers_path)"',
    )
    parser.add_argument("--version", action="version", version=f"nnunet_dycon {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    data.add_convert(commands, argv)
    data.add_preprocess_unlabeled(commands)
    data.add_sparsify(commands)
    information.add_trainers_path(commands)
    information.add_list(commands)
    scores.add_evaluate(commands)
    scores.add_compare(commands)
    pretraining.add_adapt_weights(commands)
    models.add_export_vanilla(commands)
    models.add_predict_both(commands)
    models.add_predict_uncertainty(commands)
    rounds.add_pseudo_label(commands)
    rounds.add_self_train(commands)
    rounds.add_select(commands)
    rounds.add_add_labels(commands)
    information.add_doctor(commands)
    information.add_demo(commands)
    return parser
