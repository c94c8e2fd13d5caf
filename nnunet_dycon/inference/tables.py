"""Tables as aligned text, CSV and JSON, and atomic writing of text files."""

import csv
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import explained
from nnunet_dycon.system.files import replacing


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Return a table as lines of text with aligned columns.

    Args:
        lines: the cells of each line.
        left: indices of the left-aligned columns; the others are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'<' if i in left else '>'}{width}}}" for i, width in enumerate(widths))
    return [template.format(*line).rstrip() for line in lines]


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the given columns of the rows as CSV; None and NaN become empty fields."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(nan_to_none, rows))
    return table.getvalue()


def as_json(content: Any) -> str:
    """Return the content as JSON; NaN becomes null."""
    return json.dumps(nan_to_none(content), indent=2, allow_nan=False)


def nan_to_none(value: Any) -> Any:
    """Return the value with NaN replaced by None, recursively in dicts, lists and tuples; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_texts(folder: Path, texts: Mapping[str, str], what: str) -> None:
    """Write text files into a folder, which is created if necessary. Each file is replaced atomically.

    Args:
        folder: the output folder.
        texts: maps the name of each file to its content.
        what: what the files contain, for the error message, such as "ranking".

    Raises:
        UserError: a file cannot be written.
    """
    with explained(OSError, f"{folder}: cannot write the {what}; choose another folder with -o"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replacing(folder / name) as file:
                file.write_text(text, encoding="utf-8")
