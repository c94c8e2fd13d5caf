"""Files that are whole: no half-written one ever bears its final name, and one cut short is noticed."""

import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_dycon.errors import UsageError, UserError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")  # SimpleITK reads them, and they hold a spacing in mm


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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty sibling to fill; it takes the folder's name at the end, or is removed after an error.

    Raises:
        UsageError: the folder is there already, and not empty, or a mount point.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; nothing is overwritten, so choose another -o")
    if os.path.ismount(folder):
        raise UsageError(f"{folder} is a mount point, which no folder can take the place of; name a new folder in it")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left of a run that was killed
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_whole(file: Path) -> None:
    """Raise EOFError, OSError or zlib.error if a file is empty, or a gzip file cut short or damaged.

    SimpleITK does not mind: it makes up the rest of such an image.
    """
    if file.stat().st_size == 0:
        raise EOFError("the file is empty")
    if file.suffix == ".gz":
        with gzip.open(file) as content:
            while content.read(2**24):
                pass


def require_writable(folder: Path) -> None:
    """Raise UserError if no file can be made in a folder, by making one."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); change its owner or permissions, or name another folder"
        ) from None
