"""Complete files: they are renamed when they are written completely, and truncated ones are detected."""

import codecs
import gzip
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from nnunet_dycon.errors import UsageError, UserError

# UTF-32 first: its little-endian mark starts with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")  # formats of SimpleITK with a spacing in mm


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """Yield a temporary file next to a file. It replaces the file at the end, or is removed after an error.

    The temporary name is unique, so that processes that write the same file do not disturb each other. The content is
    on the disk before the file is renamed, so that a power failure leaves the old or the new file.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # not supported by some network storage
        pass
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary empty folder next to a folder. It replaces the folder at the end, or is removed after an error.

    Raises:
        UsageError: the folder already exists and is not empty, or it is a mount point.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} already exists and is not an empty folder; choose another -o, since nothing is overwritten"
        )
    if os.path.ismount(folder):
        raise UsageError(f"{folder} is a mount point and cannot be replaced; name a new folder inside it with -o")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # remainder of a killed run
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_whole(file: Path) -> None:
    """Raise EOFError, OSError or zlib.error if a file is empty, or if a gzip file is truncated or damaged.

    SimpleITK does not detect this: it fills the rest of the image with arbitrary values.
    """
    if file.stat().st_size == 0:
        raise EOFError("the file is empty")
    if is_compressed(file):
        with gzip.open(file) as content:
            while content.read(2**24):
                pass


def is_compressed(file: Path) -> bool:
    """Return whether the content of a file is gzip. SimpleITK also reads uncompressed files that are named .nii.gz."""
    with file.open("rb") as content:
        return content.read(2) == b"\x1f\x8b"


def read_json(file: Path) -> Any:
    """Return the content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ValueError: the file is not JSON.
    """
    content = file.read_bytes()
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return json.loads(content.decode(encoding))
    return json.loads(content)


def read_text(file: Path) -> str:
    """Return the content of a text file in UTF-8 or UTF-16; bytes that are not valid become replacement characters."""
    content = file.read_bytes()
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    return content.decode(errors="replace")


def require_writable(folder: Path) -> None:
    """Create a temporary file in a folder; raise UserError if that fails."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); change its owner or permissions, or name another folder"
        ) from None
