"""Files that are whole: no half-written one ever bears its final name, and one cut short is noticed."""

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """Give a temporary sibling to write to; it takes the file's name at the end, or is removed after an error."""
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def require_whole(file: Path) -> None:
    """Raise EOFError, OSError or zlib.error if a gzip file is cut short or damaged; others are not looked into.

    SimpleITK does not mind: it makes up the rest of such an image.
    """
    if file.suffix == ".gz":
        with gzip.open(file) as content:
            while content.read(2**24):
                pass
