"""What this package offers, as data: feeds discovery, the command line and the README. Imports nothing heavy."""

import re
from dataclasses import dataclass

DYCON = "Assefa et al., DyCON, CVPR 2025, arXiv:2504.04566"
MEAN_TEACHER = "Tarvainen and Valpola, Mean teachers, NeurIPS 2017, arXiv:1703.01780"
PSEUDO_LABEL = "Lee, Pseudo-Label, ICML workshop 2013"
FIXMATCH = "Sohn et al., FixMatch, NeurIPS 2020, arXiv:2001.07685"
BCP = "Bai et al., Bidirectional Copy-Paste, CVPR 2023, arXiv:2305.00673"


@dataclass(frozen=True)
class Trainer:
    """A trainer class that `nnUNetv2_train -tr` accepts, and the module below nnunet_dycon.trainers that defines it."""

    module: str
    summary: str
    paper: str


@dataclass(frozen=True)
class Option:
    """A command line option that only one converter has."""

    flag: str
    type: type
    default: object
    metavar: str
    help: str


@dataclass(frozen=True)
class Converter:
    """A converter `nnunet_dycon convert NAME`, and the module below nnunet_dycon.dataset_conversion that defines it."""

    module: str
    summary: str
    reference: str
    options: tuple[Option, ...] = ()


def _dycon(summary: str) -> Trainer:
    return Trainer("nnUNetTrainerDyCON", summary, DYCON)


TRAINERS: dict[str, Trainer] = {
    "nnUNetTrainerDyCON": _dycon("DyCON: EMA teacher, uncertainty-aware consistency (UnCL), contrast (FeCL)"),
    "nnUNetTrainerDyCON_paper": _dycon("DyCON with the paper's weights"),
    "nnUNetTrainerDyCON_noUnCL": _dycon("DyCON without UnCL"),
    "nnUNetTrainerDyCON_noFeCL": _dycon("DyCON without FeCL"),
    "nnUNetTrainerDyCON_released": _dycon("the losses of DyCON's released code, without its label leak"),
    "nnUNetTrainerDyCON_250epochs": _dycon("DyCON, 250 epochs instead of 1000"),
    "nnUNetTrainerDyCON_50epochs": _dycon("DyCON, 50 epochs"),
    "nnUNetTrainerDyCON_5epochs": _dycon("DyCON, 5 epochs: to try a data set out"),
    "nnUNetTrainerDyCON_smoke": _dycon("DyCON, 2 epochs of 5 iterations: does everything run?"),
    "nnUNetTrainerDyCON_demo": _dycon("DyCON, a few short epochs: what `nnunet_dycon demo` trains"),
    "nnUNetTrainerMeanTeacher": Trainer(
        "nnUNetTrainerMeanTeacher", "Mean Teacher: the baseline that every other method has to beat", MEAN_TEACHER
    ),
    "nnUNetTrainerPseudoLabel": Trainer(
        "nnUNetTrainerPseudoLabel", "self-training: the student's own labels of unlabeled cases", PSEUDO_LABEL
    ),
    "nnUNetTrainerFixMatch": Trainer(
        "nnUNetTrainerPseudoLabel", "a teacher's confident labels, for strong views mixed by CutMix", FIXMATCH
    ),
    "nnUNetTrainerBCP": Trainer(
        "nnUNetTrainerPseudoLabel", "a teacher's labels, for labeled and unlabeled images pasted into each other", BCP
    ),
}

CONVERTERS: dict[str, Converter] = {
    "la": Converter(
        "la",
        "Left atrium: 100 LGE-MRI of the 2018 Atrial Segmentation Challenge, as NRRD or as the community's h5",
        "https://www.cardiacatlas.org/atriaseg2018-challenge/",
        (
            Option(
                "--spacing",
                float,
                0.625,
                "MM",
                "isotropic voxel spacing in mm (default: 0.625; the files' own headers say 1.0, which is wrong)",
            ),
        ),
    ),
}


def as_markdown() -> str:
    """The trainers as the table that stands in the README."""
    rows = ["| `-tr` | what it is | method of |", "|---|---|---|"]
    for name, trainer in TRAINERS.items():
        paper = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", trainer.paper)
        rows.append(f"| `{name}` | {trainer.summary} | {paper} |")
    return "\n".join(rows)
