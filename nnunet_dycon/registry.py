"""What this package offers, as data: feeds discovery, the command line and the README. Imports nothing heavy."""

import re
from dataclasses import dataclass

DYCON = "Assefa et al., DyCON, CVPR 2025, arXiv:2504.04566"
MEAN_TEACHER = "Tarvainen and Valpola, Mean teachers, NeurIPS 2017, arXiv:1703.01780"
PSEUDO_LABEL = "Lee, Pseudo-Label, ICML workshop 2013"
FIXMATCH = "Sohn et al., FixMatch, NeurIPS 2020, arXiv:2001.07685"
UXNET = "Lee et al., 3D UX-Net, ICLR 2023, arXiv:2209.15076"
DKUXNET = "Wu, Li and Zhang, Query Distribution Consistency, ISBI 2024, arXiv:2311.12364"
CPS = "Chen et al., Cross pseudo supervision, CVPR 2021, arXiv:2106.01226"
UGPL = "Lu et al., Uncertainty-guided pseudo-labeling, KBS 2025, arXiv:2509.13084"
BCP = "Bai et al., Bidirectional Copy-Paste, CVPR 2023, arXiv:2305.00673"


@dataclass(frozen=True)
class Trainer:
    """A trainer class that `nnUNetv2_train -tr` accepts.

    Attributes:
        module: below nnunet_dycon.trainers, which defines it.
        summary: what it is.
        paper: whose method it is.
        is_supervised: whether it uses no unlabeled cases.
        beside: the network that predicts, too, beside the student: "teacher", "second" or none.
    """

    module: str
    summary: str
    paper: str
    is_supervised: bool = False
    beside: str | None = "teacher"


@dataclass(frozen=True)
class Option:
    """A command line option that only one converter has: of type bool a switch, of type list one to give repeatedly."""

    flag: str
    type: type
    default: object
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Converter:
    """A converter `nnunet_dycon convert NAME`, and the module below nnunet_dycon.dataset_conversion that defines it."""

    module: str
    summary: str
    reference: str
    options: tuple[Option, ...] = ()
    protocols: tuple[str, ...] = ()  # published splits, in nnunet_dycon.dataset_conversion


def _dycon(summary: str) -> Trainer:
    return Trainer("nnUNetTrainerDyCON", summary, DYCON)


def _weak_to_strong(summary: str) -> Trainer:
    return Trainer("nnUNetTrainerPseudoLabel", summary, FIXMATCH)


TRAINERS: dict[str, Trainer] = {
    "nnUNetTrainerDyCON": _dycon("DyCON: EMA teacher, uncertainty-aware consistency (UnCL), contrast (FeCL)"),
    "nnUNetTrainerDyCON_paper": _dycon("DyCON with the paper's weights, nothing mixed"),
    "nnUNetTrainerDyCON_noUnCL": _dycon("DyCON without UnCL"),
    "nnUNetTrainerDyCON_noFeCL": _dycon("DyCON without FeCL"),
    "nnUNetTrainerDyCON_released": _dycon("the losses of DyCON's released code, without its label leak"),
    "nnUNetTrainerDyCON_250epochs": _dycon("DyCON, 250 epochs instead of 1000"),
    "nnUNetTrainerDyCON_50epochs": _dycon("DyCON, 50 epochs"),
    "nnUNetTrainerDyCON_5epochs": _dycon("DyCON, 5 epochs: to try a data set out"),
    "nnUNetTrainerDyCON_smoke": _dycon("DyCON, 2 epochs of 5 iterations: does everything run?"),
    "nnUNetTrainerDyCON_demo": _dycon("DyCON, a few short epochs: what `nnunet_dycon demo` trains"),
    "nnUNetTrainerDyCONCoTraining": Trainer(
        "nnUNetTrainerDyCONCoTraining",
        "DyCON's losses between two networks instead of student and teacher",
        DYCON,
        beside="second",
    ),
    "nnUNetTrainerMeanTeacher": Trainer(
        "nnUNetTrainerMeanTeacher", "Mean Teacher: the baseline that every other method has to beat", MEAN_TEACHER
    ),
    "nnUNetTrainerPseudoLabel": Trainer(
        "nnUNetTrainerPseudoLabel", "self-training: the student's own labels of unlabeled cases", PSEUDO_LABEL
    ),
    "nnUNetTrainerFixMatch": Trainer(
        "nnUNetTrainerPseudoLabel", "a teacher's confident labels, for strong views mixed by CutMix", FIXMATCH
    ),
    "nnUNetTrainerWeakToStrong": _weak_to_strong("a teacher's labels, all of them, for strong views mixed by CutMix"),
    "nnUNetTrainerWeakToStrong_250epochs": _weak_to_strong("WeakToStrong, 250 epochs instead of 1000"),
    "nnUNetTrainerWeakToStrong_50epochs": _weak_to_strong("WeakToStrong, 50 epochs"),
    "nnUNetTrainerWeakToStrong_5epochs": _weak_to_strong("WeakToStrong, 5 epochs: to try a data set out"),
    "nnUNetTrainerBCP": Trainer(
        "nnUNetTrainerPseudoLabel", "a teacher's labels, for labeled and unlabeled images pasted into each other", BCP
    ),
    "nnUNetTrainerCPS": Trainer("nnUNetTrainerCPS", "two networks that label for each other", CPS, beside="second"),
    "nnUNetTrainerUGPL": Trainer(
        "nnUNetTrainerUGPL",
        "two networks, labels weighted and filtered by uncertainty, contrast with prototypes",
        UGPL,
        beside="second",
    ),
    "nnUNetTrainerDKUXNet": Trainer(
        "nnUNetTrainerDKUXNet",
        "DK-UXNet: 3D UX-Net with a k-means mask transformer; segmentation and queries agree in two views",
        DKUXNET,
        beside=None,
    ),
    "nnUNetTrainerUXNet": Trainer(
        "nnUNetTrainerUXNet", "3D UX-Net without unlabeled cases", UXNET, is_supervised=True, beside=None
    ),
}

# The trainer to pick: docs/methods.md has what it was compared with.
RECOMMENDED = "nnUNetTrainerWeakToStrong"

# What nnU-Net looks up to predict with, beside them: the builder of the second of two networks.
BUILDERS: dict[str, str] = {"nnUNetTrainerSecondNetwork": "nnUNetTrainerSecondNetwork"}

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
        ("uamt",),
    ),
    "isles22": Converter(
        "isles22",
        "Stroke lesions: 250 MRI (DWI, ADC, FLAIR) of ISLES 2022, as released or as in the challenge",
        "https://doi.org/10.5281/zenodo.7153326",
        (
            Option(
                "--modalities",
                str,
                None,
                "LIST",
                "dwi, and of adc,flair (default: dwi,adc; with --protocol dwi alone, as in the papers); flair is "
                "resampled to the grid of dwi",
            ),
            Option("--harmonize_adc", bool, False, None, "bring ADC, which comes in three units, to 1e-6 mm^2/s"),
            Option("--keep_empty", bool, False, None, "keep cases with an empty mask among val and test of a protocol"),
        ),
        ("dycon", "dycon_fold1", "dycon_fold2"),
    ),
    "brats19": Converter(
        "brats19",
        "Brain tumors: 335 MRI with four modalities of BraTS 2019; .nii.gz, or .nii as re-uploaded",
        "https://www.med.upenn.edu/cbica/brats2019/data.html",
        (
            Option(
                "--modalities",
                str,
                None,
                "LIST",
                "of t1,t1ce,t2,flair (default: all four; with --protocol flair alone, as in the papers)",
            ),
            Option(
                "--target",
                str,
                "wt",
                None,
                "wt: the whole tumor, as in the papers (default); regions: whole tumor, tumor core, enhancing tumor",
                ("wt", "regions"),
            ),
        ),
        ("ssl4mis",),
    ),
    "pancreas_ct": Converter(
        "pancreas_ct",
        "Pancreas: 80 CT of the NIH (TCIA Pancreas-CT), as DICOM or NIfTI, or as the community's h5",
        "https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
        (
            Option(
                "--keep_duplicates",
                bool,
                False,
                None,
                "keep PANCREAS_0025 and PANCREAS_0070, which are the scan of PANCREAS_0002",
            ),
        ),
        ("dycon", "dycon_fold1", "dycon_fold2", "dycon_fold3", "mcnet"),
    ),
    "msd": Converter(
        "msd",
        "Medical Segmentation Decathlon: any of its ten tasks, CT or MRI, with one channel or several",
        "http://medicaldecathlon.com/",
        (
            Option(
                "--test_as_unlabeled",
                bool,
                False,
                None,
                "make the images of imagesTs, which have no labels, unlabeled cases (imagesUn); by default they are "
                "test cases and stay in imagesTs. With --split the lists of the file decide",
            ),
        ),
    ),
    "folder": Converter(
        "folder",
        "Your own scans with and without labels: any folder, NIfTI, NRRD, DICOM and other formats, found by patterns",
        "your own",
        (
            Option("--name", str, "Own", "NAME", "of the data set: DatasetXXX_NAME (default: Own)"),
            Option(
                "--channel",
                list,
                None,
                "NAME=PATTERN",
                "a channel, such as CT='images/{case}.nrrd'; give it once per channel, in their order. In a pattern "
                "{case} stands for the name of the case, * for anything but a slash, **/ for any folders; one that "
                "ends in a slash finds folders with a DICOM series each. nnU-Net normalizes a channel called CT as CT",
            ),
            Option(
                "--masks",
                str,
                None,
                "PATTERN",
                "the labels, such as 'masks/{case}_seg.nrrd'; a case without one is unlabeled",
            ),
            Option(
                "--foreground",
                list,
                None,
                "NAME=VALUES",
                "a label and its values in the files, such as tumor=2,4; give it once per label: they become 1, 2, "
                "... in this order (default: lesion=1). background=255 adds to the background",
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
