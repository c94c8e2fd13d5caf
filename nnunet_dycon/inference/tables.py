"""Tables as aligned text and as CSV, and files that appear only when they are complete."""

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
    """Return the lines of a table as text: the columns in `left` aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'<' if i in left else '>'}{width}}}" for i, width in enumerate(widths))
    return [template.format(*line).rstrip() for line in lines]


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a CSV with these columns of the rows; None and NaN become empty fields."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(nan_to_none, rows))
    return table.getvalue()


def as_json(content: Any) -> str:
    """Return JSON; NaN becomes null."""
    return json.dumps(nan_to_none(content), indent=2, allow_nan=False)


def nan_to_none(value: Any) -> Any:
    """Replace NaN by None in dicts, lists and tuples, which become lists."""
    if isinstance(value, Mapping):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_texts(folder: Path, texts: Mapping[str, str], what: str) -> None:
    """Write files by name into a folder, which is made. `what` is the word for them in the message of a UserError."""
    with explained(OSError, f"{folder}: cannot write the {what}; choose another -o"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replacing(folder / name) as file:
                file.write_text(text, encoding="utf-8")
