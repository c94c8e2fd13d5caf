"""Semi-supervised training for nnU-Net v2."""

from pathlib import Path

__version__ = "0.2.0"

# trainers/ and dataset_conversion/ lie beside this package in a checkout and below it when installed. Python started in
# a checkout whose package is installed elsewhere (or only on PYTHONPATH) imports this folder, which lacks the two.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "trainers").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
