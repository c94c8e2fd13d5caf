"""Checks of the environment: the version of nnU-Net and its environment variables."""

import os
import re
from importlib import metadata
from pathlib import Path

from nnunet_dycon.errors import UsageError

OLDEST_NNUNET = (2, 8)
FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
DISCOVERY = Path(__file__).parents[1] / "discovery"  # the folder that nnUNet_extTrainer must contain


def require_nnunet() -> None:
    """Raise UsageError unless nnU-Net 2.8.0 or newer is installed.

    Older versions ignore nnUNet_extTrainer, the environment variable for folders with external trainers.
    """
    try:
        version = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        raise UsageError("nnU-Net is not installed; run: pip install 'nnunetv2>=2.8.0,<2.9'") from None
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_NNUNET:
        raise UsageError(
            f"nnU-Net {version} is too old: it ignores nnUNet_extTrainer and cannot find the trainers of nnunet_dycon; "
            "run: pip install 'nnunetv2>=2.8.0,<2.9'"
        )


def nnunet_folder(variable: str) -> Path:
    """Return the path in one of nnU-Net's environment variables for folders. The folder need not exist.

    Args:
        variable: nnUNet_raw, nnUNet_preprocessed or nnUNet_results.

    Raises:
        UsageError: the variable is not set; or its value starts with ~, or starts or ends with a quote or white space.
            nnU-Net would take these characters as part of the folder's name.
    """
    value = os.environ.get(variable)
    if not value:
        raise UsageError(f"the environment variable {variable} is not set; run: export {variable}=/path/to/{variable}")
    for found, problem in ((value.startswith("~"), "starts with ~, which was quoted and is not expanded"),
                           (value != value.strip(), "starts or ends with white space, or has a Windows line end"),
                           (value[0] in "\"'" or value[-1] in "\"'", "contains quotes")):  # fmt: skip
        if found:
            raise UsageError(f"{variable}={value!r} {problem}; run: export {variable}=/path/to/{variable}")
    return Path(value)


def external_trainers() -> str:
    """Return the user's nnUNet_extTrainer with the folder of this package's trainers added."""
    return os.pathsep.join(filter(None, (str(DISCOVERY), os.environ.get("nnUNet_extTrainer"))))
