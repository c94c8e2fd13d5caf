"""Atomic writing: files and folders are written under a temporary name and then renamed. Also checks of files."""

import gzip
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_dycon.errors import UsageError, UserError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")  # formats of SimpleITK with a spacing in mm


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of `file`. At the end, rename it to `file`; after an error, remove it.

    The temporary name is unique, so that several processes can write the same file at once. The content is flushed to
    the disk before the renaming, so that after a power failure either the old or the new file exists, and is complete.
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `folder`. At the end, rename it to `folder`; after an error, remove it.

    Raises:
        UsageError: `folder` exists and is not an empty folder, or it is a mount point.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} already exists and is not an empty folder; choose another folder with -o, or empty this one"
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

    SimpleITK does not detect a truncated file: it fills the rest of the image with arbitrary values.
    """
    if file.stat().st_size == 0:
        raise EOFError("the file is empty")
    if file.suffix == ".gz":
        with gzip.open(file) as content:
            while content.read(2**24):
                pass


def require_writable(folder: Path) -> None:
    """Raise UserError if no file can be created in a folder, which is tested with a temporary file."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); change its owner or permissions, or name another folder"
        ) from None
