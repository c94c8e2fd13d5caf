"""What must be there before any work starts: a recent nnU-Net and its environment variables."""

import os
import re
from importlib import metadata
from pathlib import Path

from nnunet_dycon.errors import UsageError

OLDEST_NNUNET = (2, 8)
DISCOVERY = Path(__file__).parents[1] / "discovery"  # what nnUNet_extTrainer must name


def require_nnunet() -> None:
    """Raise UsageError unless nnU-Net 2.8.0 or newer is installed (older ones ignore nnUNet_extTrainer)."""
    try:
        version = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        raise UsageError("nnU-Net is not installed; run: pip install 'nnunetv2>=2.8.0,<2.9'") from None
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_NNUNET:
        raise UsageError(
            f"nnU-Net {version} is too old: it ignores nnUNet_extTrainer and cannot find these trainers; "
            "run: pip install 'nnunetv2>=2.8.0,<2.9'"
        )


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's variables (nnUNet_raw, nnUNet_preprocessed, nnUNet_results) names."""
    value = os.environ.get(variable)
    if not value:
        raise UsageError(f"the environment variable {variable} is not set; run: export {variable}=/path/to/{variable}")
    return Path(value)
