"""All sub-commands of nnunet_dycon."""

from nnunet_dycon.cli import build_parser
from nnunet_dycon.registry import CONVERTERS

COMMANDS = [
    *build_parser()._subparsers._group_actions[0].choices,
    *(f"convert {name}" for name in CONVERTERS),
]
