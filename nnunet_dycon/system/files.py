"""Complete files: they are renamed when they are written completely, and truncated ones are detected."""

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
    if file.suffix == ".gz":
        with gzip.open(file) as content:
            while content.read(2**24):
                pass


def require_writable(folder: Path) -> None:
    """Create a temporary file in a folder; raise UserError if that fails."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); change its owner or permissions, or name another folder"
        ) from None
