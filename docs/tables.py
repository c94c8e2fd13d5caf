"""Generation of the documentation's tables, lists and figures from results, settings and command-line parsers.

    python -m docs.tables [--check]

In a page, a generated part is between two comments. The first comment contains its kind and its arguments:

    <!-- settings: nnUNetTrainerDyCON nnUNetTrainerDyCON_adapted -->
    <!-- end -->

- settings TRAINER ...: settings of the trainers' methods, with their values and descriptions;
- choice: when to use which trainer, and what it gained with 4 labels, for the README;
- trainers [GROUP ...]: all trainers of `nnunet_dycon list`, or those of some groups;
- converters: all converters of `nnunet_dycon convert`;
- cli: all commands with their options;
- the tables of `benchmarks.pages`.

The figures are those of `docs.figures`. With --check, nothing is written, and the exit code is 1 if a file is out of
date.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe

from benchmarks import pages
from benchmarks.measuring import markdown
from docs import figures
from docs.hooks import markdown_math
from nnunet_dycon.cli import build_parser
from nnunet_dycon.registry import CONVERTERS, TRAINERS
from nnunet_dycon.trainers import trainer_class

DOCS = Path(__file__).parent
ROOT = DOCS.parent
_BLOCK = re.compile(r"(<!-- (?P<kind>\w+):?(?P<arguments>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_USE = {
    "nnUNetTrainerWeakToStrong": "**by default**; FixMatch and PseudoLabel did not differ significantly",
    "nnUNetTrainerDyCON_adapted": "for DyCON's losses in nnU-Net",
    "nnUNetTrainerDyCON": "to compare with the published DyCON",
    "nnUNetTrainerUGPL": "to compare with co-training of two networks",
    "nnUNetTrainerDKUXNet": "to compare with a mask transformer (7.6 times the time per patch)",
}
_METHOD_PAGES = {
    "nnUNetTrainerDyCON_released": "dycon",
    "nnUNetTrainerDyCON_adapted": "dycon",
    "nnUNetTrainerDyCONCoTraining": "dycon_cotraining",
    "nnUNetTrainerDKUXNet": "dkuxnet",
    "nnUNetTrainerUXNet": "dkuxnet",
    "nnUNetTrainerWeakToStrong": "weak_to_strong",
    "nnUNetTrainerMeanTeacher": "mean_teacher",
    "nnUNetTrainerPseudoLabel": "pseudo_label",
}


def settings(*trainers: str) -> str:
    """Return the Markdown table of the method settings of trainers, with a column of values per trainer.

    The descriptions are those of the docstrings of the settings' classes.

    Args:
        trainers: names of trainers whose settings have the same class.
    """
    values = [trainer_class(trainer).method_settings for trainer in trainers]
    (kind,) = {type(each) for each in values}
    meaning = dict(_attributes(kind))
    rows = [
        (f"`{field.name}`", *(_value(getattr(each, field.name)) for each in values), meaning[field.name])
        for field in fields(kind)
    ]
    headings = [f"`{trainer}`" for trainer in trainers] if len(trainers) > 1 else ["default"]
    return markdown(("setting", *headings, "meaning"), rows)


def _attributes(kind: type) -> Iterator[tuple[str, str]]:
    """Yield names and descriptions of the attributes in the docstrings of a class and its base classes."""
    for base in kind.__mro__[:-1]:
        for section in griffe.Docstring(inspect.getdoc(base) or "", parser="google").parse():
            if section.kind is griffe.DocstringSectionKind.attributes:
                for attribute in section.value:
                    yield attribute.name, _cell(attribute.description)


def _cell(text: str) -> str:
    return " ".join(markdown_math(text).split()).replace("|", r"\|").removesuffix(".")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return ", ".join(map(_value, value))
    return "none" if value is None else f"`{value}`" if isinstance(value, str) else str(value)


def trainers(*groups: str) -> str:
    """Return the Markdown table of trainers, with links to the pages of their methods from docs/reference/methods.

    Args:
        groups: the first words of the names of groups, such as "published"; none for all.
    """
    rows = [
        (f"[`{name}`]({method_page(name)})", its.group, its.summary, _linked(its.paper))
        for name, its in TRAINERS.items()
        if not groups or its.group.split()[0] in groups
    ]
    return markdown(("`-tr`", "group", "method", "source"), rows)


def method_page(trainer: str) -> str:
    """Return the file name of the page in docs/reference/methods that describes a trainer."""
    return f"{_METHOD_PAGES.get(trainer, trainer.removeprefix('nnUNetTrainer').lower())}.md"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def choice() -> str:
    """Return the Markdown table of the trainers to choose from, with their gains with 4 labeled cases.

    A gain is the difference of Dice to nnU-Net's own trainer on the labeled cases alone.
    """
    gains = {
        "left atrium (MRI)": ("la_3p5mm", "la", "la_600"),
        "hippocampus (MRI)": ("hippocampus",),
        "small lesions (synthetic)": ("phantom",),
    }
    rows = [
        (f"[`{name}`](docs/reference/methods/{method_page(name)})", use,
         *(pages.gain(name, 4, *files) or "not measured" for files in gains.values()))
        for name, use in _USE.items()
    ]  # fmt: skip
    return markdown(("`-tr`", "use it", *gains), rows)


def converters() -> str:
    """Return the Markdown table of converters, with links to their pages from docs/reference/datasets."""
    rows = []
    for name, its in CONVERTERS.items():
        source = f"<{its.reference}>" if its.reference.startswith("http") else its.reference
        rows.append((f"[`nnunet_dycon convert {name}`]({name}.md)", its.summary, source))
    return markdown(("command", "data", "source"), rows)


def cli() -> str:
    """Return the description of all commands and their options, from the parsers, with one heading per command."""
    parts: list[str] = []
    for name in _commands(build_parser()):
        parts += _described(f"nnunet_dycon {name}", _commands(build_parser([name]))[name], "##")
        if name == "convert":
            for each in _commands(_commands(build_parser([name]))[name]):
                parser = _commands(_commands(build_parser([name, each]))[name])[each]
                parts += _described(f"nnunet_dycon {name} {each}", parser, "###")
    return "\n\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:  # argparse has no public list of sub-commands and options
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _described(title: str, parser: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    yield f"{heading} {title}"
    if parser.description:
        yield _plain(parser.description)
    actions = [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        and action.help != argparse.SUPPRESS
    ]
    one_of = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    needed = [_shown(action) for action in actions if action.required]
    needed += [f"({' | '.join(map(_shown, group))})" for group in one_of]
    rest = ["[options]"] if any(not action.required for action in actions) else []
    if actions:  # the usage of argparse depends on the version of Python and on the width of the terminal
        yield f"```text\n{' '.join([title, *needed, *rest])}\n```"
        rows = []
        for action in actions:
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            rows.append(
                (f"`{_shown(action)}`".replace("|", r"\|"), _plain(text).replace("|", r"\|").replace("\n", " "))
            )
        yield markdown(("option", "meaning"), rows)
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```"


def _shown(action: argparse.Action) -> str:
    """Return how an option is written, such as "-np, --num_processes N"."""
    value = action.metavar or ("" if action.nargs == 0 else "|".join(map(str, action.choices or [action.dest.upper()])))
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.nargs in ("+", "*"):
        value += " ..."
    return " ".join(part for part in (", ".join(action.option_strings), value) if part)


def _plain(text: str) -> str:
    """Return text in which characters that Markdown would interpret are escaped."""
    return re.sub(r"([<>*_\[\]])", r"\\\1", text.strip())


MAKERS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "choice": choice,
    "trainers": trainers,
    "converters": converters,
    "cli": cli,
    **pages.MAKERS,
}


def filled(text: str) -> str:
    """Return the text of a page with all generated parts made anew.

    Args:
        text: the Markdown text of the page, with the comments that the module docstring describes.
    """

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{MAKERS[match['kind']](*match['arguments'].split())}\n\n{match[4]}"

    return _BLOCK.sub(fill, text)


def all_pages() -> list[Path]:
    """Return the README and all pages in docs."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def main() -> int:
    """Write the generated parts of all pages and all figures, or only check them with --check.

    Returns:
        Exit code: 1 if --check finds a page or figure that is out of date, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file would change")
    check = parser.parse_args().check
    contents = {page: filled(page.read_text()) for page in all_pages()} | figures.files()
    out_of_date = [file for file, new in contents.items() if not file.is_file() or file.read_text() != new]
    for file in out_of_date:
        if not check:
            file.write_text(contents[file])
        print(file.relative_to(ROOT), "is out of date; run: make tables" if check else "written")
    return int(bool(out_of_date) and check)


if __name__ == "__main__":
    sys.exit(main())
