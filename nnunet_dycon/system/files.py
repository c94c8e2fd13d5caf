"""Atomic writing of files and folders, reading of text files, and checks of files.

Files and folders are written under a temporary name and then renamed.
"""

import codecs
import gzip
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from nnunet_dycon.errors import UsageError, UserError, explained
from nnunet_dycon.system.locks import Lock

# UTF-32 first: its little-endian mark starts with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")  # formats of SimpleITK with a spacing in mm


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """Yield a temporary path for a new version of `file`, in the same folder.

    At the end of the `with` block, rename the temporary file to `file`; after an error, remove it. The temporary name
    is unique, so that several processes can write the same file at once. The content is flushed to the disk before the
    renaming, so that after a power failure either the old or the new file exists, and is complete.

    Args:
        file: the file to create or to replace.
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
    """Flush the content of a file to the disk, if the storage supports it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # not supported by some network storage
        pass
    finally:
        os.close(descriptor)


def require_new_folder(folder: Path) -> None:
    """Raise UsageError if a folder cannot be created: it exists and is not an empty folder, or it is a mount point."""
    with explained(OSError, f"{folder} cannot be entered; choose another folder with -o"):
        is_taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if is_taken:
        raise UsageError(
            f"{folder} already exists and is not an empty folder; choose another folder with -o, or empty this one"
        )
    if os.path.ismount(folder):
        raise UsageError(f"{folder} is a mount point and cannot be replaced; name a new folder inside it with -o")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `folder`.

    At the end of the `with` block, rename the temporary folder to `folder`; after an error, remove it with its content.
    A lock prevents two processes from writing the same folder at once.

    Args:
        folder: the folder to create, which may exist if it is empty.

    Raises:
        UsageError: `folder` exists and is not an empty folder, or it is a mount point.
        UserError: another process is writing `folder`.
    """
    folder = folder.resolve()
    require_new_folder(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder.with_name(f".{folder.name}.lock"), f"a command that writes {folder.name}")
    lock.acquire()
    with closing(lock):
        try:
            for remainder in folder.parent.glob(f".{escape(folder.name)}.*.partial"):  # of a killed run
                shutil.rmtree(remainder, ignore_errors=True)
            partial.mkdir()
            yield partial
            lock.check()
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def link_or_copy(file: Path | str, link: Path) -> None:
    """Create a hard link to a file, or a copy if the file system does not support links; replace an existing `link`."""
    link.unlink(missing_ok=True)
    file = Path(file).resolve()  # of a symbolic link, the link itself would be linked
    try:
        os.link(file, link)
    except OSError:
        shutil.copyfile(file, link)


def require_whole(file: Path) -> int:
    """Return the length of a file in bytes after decompression; raise an error if it is empty or a damaged gzip file.

    SimpleITK does not detect a truncated file: it fills the rest of the image with arbitrary values.

    Raises:
        EOFError: the file is empty, or a gzip file is truncated.
        OSError: the file cannot be read, or the header or the checksum of a gzip file is wrong.
        zlib.error: the compressed data of a gzip file is damaged.
    """
    length = file.stat().st_size
    if length == 0:
        raise EOFError("the file is empty")
    if not is_compressed(file):
        return length
    with gzip.open(file) as content:
        while content.read(2**24):
            pass
        return content.tell()


def is_compressed(file: Path) -> bool:
    """Return whether a file starts with the two bytes of gzip.

    The file name is not sufficient, since there are uncompressed NIfTI files named .nii.gz, which SimpleITK reads.
    """
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
    """Return the content of a text file in UTF-8, UTF-16 or UTF-32, without its byte order mark.

    UTF-16 and UTF-32 are recognized by this mark. Invalid bytes become replacement characters (U+FFFD).
    """
    content = file.read_bytes()
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    return content.decode(errors="replace")


def require_writable(folder: Path) -> None:
    """Raise UserError if a temporary file cannot be created in a folder."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); change its owner or permissions, or name another folder"
        ) from None
