"""All sub-commands of nnunet_dycon."""

from nnunet_dycon.registry import CONVERTERS

COMMANDS = [
    "convert",
    *(f"convert {name}" for name in CONVERTERS),
    "preprocess_unlabeled",
    "trainers_path",
    "list",
    "evaluate",
    "compare",
    "export_vanilla",
    "predict_both",
    "predict_uncertainty",
    "doctor",
    "demo",
]
