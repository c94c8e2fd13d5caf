"""Functions that MkDocs and mkdocstrings call when the site is built, see mkdocs.yml.

Pages are written to be read on the site and in the repository, docstrings also in the code.
"""

import os
import re
import textwrap
from typing import Any

import griffe

_BLOCK = re.compile(r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)\n(?P<rest>(?:(?P=indent) +[^\n]*\n|\s*\n)*)", re.M)
_DOCTEST = re.compile(r"^(?P<indent> *)>>> [^\n]*\n(?:(?P=indent)\S[^\n]*\n)*", re.M)


def markdown_math(text: str) -> str:
    r"""Return a docstring in which ``.. math::`` is ``$$ ... $$`` and ``:math:`x``` is ``$x$``.

    An empty line within a block separates two equations, as in Sphinx.
    """

    def block(match: re.Match) -> str:
        indent = match["indent"]
        rest = textwrap.dedent(match["rest"])
        equations = [part.strip() for part in re.split(r"\n\s*\n", f"{match['first'].strip()}\n{rest}") if part.strip()]
        return "".join(
            f"\n{textwrap.indent(f'$${chr(10)}{equation}{chr(10)}$$', indent)}\n\n" for equation in equations
        )

    return re.sub(r":math:`([^`]*)`", r"$\1$", _BLOCK.sub(block, text + "\n"))


def fenced_doctests(text: str) -> str:
    """Return a docstring in which doctests are fenced code; Markdown would show ``>>>`` as nested quotes."""

    def fence(match: re.Match) -> str:
        return f"{match['indent']}```pycon\n{match[0]}{match['indent']}```\n"

    return _DOCTEST.sub(fence, text + "\n")


class Equations(griffe.Extension):
    """Extension of griffe, which reads the docstrings for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of an object after griffe has read it."""
        if obj.docstring is not None:
            obj.docstring.value = fenced_doctests(markdown_math(obj.docstring.value))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the text of a page without links to files outside docs, which exist only in the repository.

    MkDocs calls this function for each page.
    """
    folder = os.path.dirname(page.file.src_uri)

    def text_of(match: re.Match) -> str:
        leaves = os.path.normpath(os.path.join(folder, match["target"])).startswith("..")
        return match["text"] if leaves else match[0]

    return re.sub(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)", text_of, markdown)
