"""Registry of trainers and converters for discovery, command line and README; pure data without heavy imports."""

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


# Groups of trainers, in the order in which they are listed.
RECOMMENDED_DEFAULT, PUBLISHED, ADAPTED, BASELINE = "recommended", "published methods", "adapted methods", "baselines"


@dataclass(frozen=True)
class Trainer:
    """A trainer class that `nnUNetv2_train -tr` accepts, defined in the module of its name in nnunet_dycon.trainers.

    Attributes:
        group: recommended, published method, adapted method or baseline.
        summary: one line.
        paper: the source of the method.
        is_supervised: whether it uses no unlabeled cases.
        beside: the second network that can predict: "teacher", "second" or none.
        caveat: what a user should know before choosing it; logged when training starts.
    """

    group: str
    summary: str
    paper: str
    is_supervised: bool = False
    beside: str | None = "teacher"
    caveat: str = ""


@dataclass(frozen=True)
class Option:
    """Command line option of a single converter; type bool is a switch, type list can be given repeatedly."""

    flag: str
    type: type
    default: object
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Converter:
    """Converter `nnunet_dycon convert NAME`, defined in a module of nnunet_dycon.dataset_conversion."""

    module: str
    summary: str
    reference: str
    options: tuple[Option, ...] = ()
    protocols: tuple[str, ...] = ()  # names of published splits in dataset_conversion/published_splits


# Held to benchmarks/results/la.csv by tests/benchmarks/test_results.py.
DYCON_CAVEAT = (
    "No gain over nnUNetTrainer was measured: -0.001 Dice with 4 labels (left atrium, 1 seed, 8 cases of val; "
    "docs/results.md). Recommended: nnUNetTrainerWeakToStrong; adapted to nnU-Net: nnUNetTrainerDyCON_adapted."
)

TRAINERS: dict[str, Trainer] = {
    "nnUNetTrainerWeakToStrong": Trainer(
        RECOMMENDED_DEFAULT,
        "pseudo-labels of an EMA teacher for strongly augmented views mixed by CutMix",
        f"derived from {FIXMATCH}",
    ),
    "nnUNetTrainerDyCON": Trainer(
        PUBLISHED,
        "DyCON: EMA teacher, uncertainty-aware consistency (UnCL), focal entropy-aware contrast (FeCL)",
        DYCON,
        caveat=DYCON_CAVEAT,
    ),
    "nnUNetTrainerDyCON_released": Trainer(PUBLISHED, "DyCON's released code without its label leak", DYCON),
    "nnUNetTrainerUGPL": Trainer(
        PUBLISHED,
        "two networks, pseudo-labels weighted and filtered by uncertainty, contrast with prototypes",
        UGPL,
        beside="second",
    ),
    "nnUNetTrainerDKUXNet": Trainer(
        PUBLISHED,
        "DK-UXNet: 3D UX-Net with a k-means mask transformer; consistency of segmentation and queries in two views",
        DKUXNET,
        beside=None,
    ),
    "nnUNetTrainerBCP": Trainer(
        PUBLISHED, "pseudo-labels of a teacher; labeled and unlabeled images are pasted into each other", BCP
    ),
    "nnUNetTrainerCPS": Trainer(
        PUBLISHED, "cross pseudo supervision: two networks, each with pseudo-labels of the other", CPS, beside="second"
    ),
    "nnUNetTrainerFixMatch": Trainer(
        PUBLISHED, "confident pseudo-labels of a teacher for strongly augmented views mixed by CutMix", FIXMATCH
    ),
    "nnUNetTrainerDyCON_adapted": Trainer(
        ADAPTED, "DyCON with other weights, CutMix and stronger intensity augmentation", f"derived from {DYCON}"
    ),
    "nnUNetTrainerDyCONCoTraining": Trainer(
        ADAPTED,
        "DyCON's losses between two networks instead of student and teacher",
        f"derived from {DYCON}",
        beside="second",
    ),
    "nnUNetTrainerMeanTeacher": Trainer(
        BASELINE, "Mean Teacher: consistency with an EMA teacher, without uncertainty", MEAN_TEACHER
    ),
    "nnUNetTrainerPseudoLabel": Trainer(BASELINE, "self-training with the student's own pseudo-labels", PSEUDO_LABEL),
    "nnUNetTrainerUXNet": Trainer(BASELINE, "3D UX-Net on labeled cases only", UXNET, is_supervised=True, beside=None),
}

RECOMMENDED = next(name for name, trainer in TRAINERS.items() if trainer.group == RECOMMENDED_DEFAULT)

# The rule behind all other names that `nnUNetv2_train -tr` accepts.
LENGTHS = (
    "Each trainer has every length: NAME_50epochs (any number) instead of 1000 epochs, NAME_smoke for 2 epochs of 5 "
    "iterations, to see whether everything runs."
)

# Former names, and what to use now.
RETIRED: dict[str, str] = {
    "nnUNetTrainerDyCON_paper": "the published method is nnUNetTrainerDyCON now",
    "nnUNetTrainerDyCON_noUnCL": "derive a class from nnUNetTrainerDyCON with uncl_weight=0, see docs/methods.md",
    "nnUNetTrainerDyCON_noFeCL": "derive a class from nnUNetTrainerDyCON with fecl_weight=0, see docs/methods.md",
    "nnUNetTrainerDyCON_demo": f"`nnunet_dycon demo` trains {RECOMMENDED} now",
}

# Classes that nnU-Net looks up besides: the builder of the second of two networks, and the short training of the demo.
BUILDERS = ("nnUNetTrainerSecondNetwork", "nnUNetTrainerDemo")

CONVERTERS: dict[str, Converter] = {
    "la": Converter(
        "la",
        "Left atrium: 100 LGE-MRI of the 2018 Atrial Segmentation Challenge, as NRRD or as the h5 files of UA-MT",
        "https://www.cardiacatlas.org/atriaseg2018-challenge/",
        (
            Option(
                "--spacing",
                float,
                0.625,
                "MM",
                "isotropic voxel spacing in mm (default: 0.625; the headers of the files have 1.0, which is wrong)",
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
                "dwi and optionally adc and flair, separated by commas (default: dwi,adc; with --protocol dwi, as in "
                "the papers); flair is resampled to the grid of dwi",
            ),
            Option(
                "--harmonize_adc",
                bool,
                False,
                None,
                "convert ADC, which has three different units in the dataset, to 1e-6 mm^2/s",
            ),
            Option("--keep_empty", bool, False, None, "keep cases with an empty mask in val and test of a protocol"),
        ),
        ("dycon", "dycon_fold1", "dycon_fold2"),
    ),
    "brats19": Converter(
        "brats19",
        "Brain tumors: 335 MRI with four modalities of BraTS 2019, as NIfTI or as the h5 files of SSL4MIS",
        "https://www.med.upenn.edu/cbica/brats2019/data.html",
        (
            Option(
                "--modalities",
                str,
                None,
                "LIST",
                "modalities of t1,t1ce,t2,flair (default: all four; with --protocol flair, as in the papers)",
            ),
            Option(
                "--target",
                str,
                "wt",
                None,
                "wt: the whole tumor, as in the papers (default); regions: whole tumor, tumor core and enhancing tumor",
                ("wt", "regions"),
            ),
        ),
        ("ssl4mis",),
    ),
    "pancreas_ct": Converter(
        "pancreas_ct",
        "Pancreas: 80 CT of the NIH (TCIA Pancreas-CT), as DICOM or NIfTI, or as h5 files of MC-Net, BCP or DyCON",
        "https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
        (
            Option(
                "--keep_duplicates",
                bool,
                False,
                None,
                "keep PANCREAS_0025 and PANCREAS_0070, which are copies of the scan PANCREAS_0002",
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
        "Own scans with and without labels: any folder with NIfTI, NRRD, DICOM or other formats, found by patterns",
        "your own",
        (
            Option("--name", str, "Own", "NAME", "name of the dataset, DatasetXXX_NAME (default: Own)"),
            Option(
                "--channel",
                list,
                None,
                "NAME=PATTERN",
                "a channel, such as CT='images/{case}.nrrd'; give the option once per channel, in order. In a pattern "
                "{case} matches the name of the case, * any characters except a slash, **/ any folders; a pattern that "
                "ends in a slash matches folders with one DICOM series each. nnU-Net normalizes a channel called CT as "
                "CT",
            ),
            Option(
                "--masks",
                str,
                None,
                "PATTERN",
                "pattern of the labels, such as 'masks/{case}_seg.nrrd'; a case without a label is unlabeled",
            ),
            Option(
                "--foreground",
                list,
                None,
                "NAME=VALUES",
                "a label and its values in the files, such as tumor=2,4; give the option once per label: labels become "
                "1, 2, ... in this order (default: lesion=1). background=255 adds the value to the background",
            ),
        ),
    ),
}


def groups() -> dict[str, list[str]]:
    """Return the names of the trainers by group."""
    found: dict[str, list[str]] = {}
    for name, trainer in TRAINERS.items():
        found.setdefault(trainer.group, []).append(name)
    return found


def as_markdown() -> str:
    """Return the trainers as the table in the README."""
    rows = ["| `-tr` | what it is | source |", "|---|---|---|"]
    for group, names in groups().items():
        rows.append(f"| **{group}** | | |")
        for name in names:
            paper = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", TRAINERS[name].paper)
            rows.append(f"| `{name}` | {TRAINERS[name].summary} | {paper} |")
    return "\n".join(rows)
