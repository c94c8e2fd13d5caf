"""Semi-supervised training for nnU-Net v2."""

from pathlib import Path

__version__ = "0.2.0"

# In a checkout, trainers/ and dataset_conversion/ are next to this package; in an installation, they are inside it. If
# Python imports this package from a checkout that is not installed (current folder or PYTHONPATH), both must be added.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "trainers").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
