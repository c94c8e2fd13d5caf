"""Writing files so that no half-written one ever bears its final name."""

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
