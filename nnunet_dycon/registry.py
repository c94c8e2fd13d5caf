"""Names and descriptions of all trainers and data set converters, importable without torch and nnU-Net."""

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
    """Description of a trainer for `nnUNetv2_train -tr NAME`, whose class is in the module nnunet_dycon.trainers.NAME.

    Attributes:
        group: heading under which `nnunet_dycon list` shows the trainer, such as "published methods".
        summary: description of the method in one line.
        paper: reference of the method: authors, title, year.
        is_supervised: whether the trainer uses labeled cases only.
        companion: the network that is saved in addition to the student: "teacher" (the EMA of the student), "second"
            (the second of two trained networks), or None if no other network is saved.
        caveat: warning that is logged when training starts, such as a lower measured Dice; "" for no warning.
    """

    group: str
    summary: str
    paper: str
    is_supervised: bool = False
    companion: str | None = "teacher"
    caveat: str = ""


@dataclass(frozen=True)
class Converter:
    """Description of the data set converter that `nnunet_dycon convert NAME` runs.

    Its code is in the module nnunet_dycon.dataset_conversion.NAME.

    Attributes:
        summary: description of the data set in one line.
        reference: web address of the data set.
    """

    summary: str
    reference: str


# tests/benchmarks/test_results.py compares the number with benchmarks/results/hippocampus.csv.
DYCON_CAVEAT = (
    "No gain over nnUNetTrainer was measured: -0.005 Dice with 4 labels (hippocampus, 3 seeds, 40 cases of test; "
    "docs/results). Recommended: nnUNetTrainerWeakToStrong; adapted to nnU-Net: nnUNetTrainerDyCON_adapted."
)

TRAINERS: dict[str, Trainer] = {
    "nnUNetTrainerWeakToStrong": Trainer(
        RECOMMENDED_DEFAULT,
        "pseudo-labels of an EMA teacher for strongly augmented views mixed by CutMix",
        f"derived from {FIXMATCH}",
    ),
    "nnUNetTrainerDyCON": Trainer(
        PUBLISHED,
        "DyCON: EMA teacher, uncertainty-aware consistency (UnCL), focal entropy-aware contrastive loss (FeCL)",
        DYCON,
        caveat=DYCON_CAVEAT,
    ),
    "nnUNetTrainerDyCON_released": Trainer(
        PUBLISHED, "DyCON with the losses of its released code, without ground truth of unlabeled cases", DYCON
    ),
    "nnUNetTrainerUGPL": Trainer(
        PUBLISHED,
        "two networks, pseudo-labels weighted and filtered by uncertainty, contrastive loss with prototypes",
        UGPL,
        companion="second",
    ),
    "nnUNetTrainerDKUXNet": Trainer(
        PUBLISHED,
        "DK-UXNet: 3D UX-Net with a k-means mask transformer, consistency of segmentation and queries in two views",
        DKUXNET,
        companion=None,
    ),
    "nnUNetTrainerBCP": Trainer(
        PUBLISHED, "bidirectional copy-paste of labeled and unlabeled images, pseudo-labels of an EMA teacher", BCP
    ),
    "nnUNetTrainerCPS": Trainer(
        PUBLISHED,
        "cross pseudo supervision: two networks trained with each other's pseudo-labels",
        CPS,
        companion="second",
    ),
    "nnUNetTrainerFixMatch": Trainer(
        PUBLISHED, "confident pseudo-labels of an EMA teacher for strongly augmented views mixed by CutMix", FIXMATCH
    ),
    "nnUNetTrainerDyCON_adapted": Trainer(
        ADAPTED, "DyCON with adapted loss weights, CutMix and stronger intensity augmentation", f"derived from {DYCON}"
    ),
    "nnUNetTrainerDyCONCoTraining": Trainer(
        ADAPTED,
        "DyCON's losses between two networks instead of student and teacher",
        f"derived from {DYCON}",
        companion="second",
    ),
    "nnUNetTrainerMeanTeacher": Trainer(
        BASELINE, "Mean Teacher: consistency with an EMA teacher, without uncertainty", MEAN_TEACHER
    ),
    "nnUNetTrainerPseudoLabel": Trainer(BASELINE, "self-training with the student's own pseudo-labels", PSEUDO_LABEL),
    "nnUNetTrainerUXNet": Trainer(
        BASELINE, "3D UX-Net on labeled cases only", UXNET, is_supervised=True, companion=None
    ),
}

RECOMMENDED = next(name for name, trainer in TRAINERS.items() if trainer.group == RECOMMENDED_DEFAULT)

_SETTINGS = "docs/how-to/change_settings.md"
# Removed trainers and their replacements.
RETIRED: dict[str, str] = {
    "nnUNetTrainerDyCON_paper": "use nnUNetTrainerDyCON, the published method",
    "nnUNetTrainerDyCON_noUnCL": f"derive a class from nnUNetTrainerDyCON with uncl_weight=0, see {_SETTINGS}",
    "nnUNetTrainerDyCON_noFeCL": f"derive a class from nnUNetTrainerDyCON with fecl_weight=0, see {_SETTINGS}",
    "nnUNetTrainerDyCON_demo": f"use {RECOMMENDED}, which `nnunet_dycon demo` trains",
}

# Further classes that nnU-Net looks up by name: one builds second networks for prediction, two train in the demo.
BUILDERS = ("nnUNetTrainerSecondNetwork", "nnUNetTrainer_demo", "nnUNetTrainerDemo")

CONVERTERS: dict[str, Converter] = {
    "la": Converter(
        "Left atrium: 100 LGE-MRI of the 2018 Atrial Segmentation Challenge, as NRRD or as the h5 files of UA-MT",
        "https://www.cardiacatlas.org/atriaseg2018-challenge/",
    ),
    "isles22": Converter(
        "Stroke lesions: 250 MRI (DWI, ADC, FLAIR) of ISLES 2022, as released or as in the challenge",
        "https://doi.org/10.5281/zenodo.7153326",
    ),
    "brats19": Converter(
        "Brain tumors: 335 MRI with four modalities of BraTS 2019, as NIfTI or as the h5 files of SSL4MIS",
        "https://www.med.upenn.edu/cbica/brats2019/data.html",
    ),
    "pancreas_ct": Converter(
        "Pancreas: 80 CT of the NIH (TCIA Pancreas-CT), as DICOM or NIfTI, or as h5 files of MC-Net, BCP or DyCON",
        "https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
    ),
    "msd": Converter(
        "Medical Segmentation Decathlon: any of its ten tasks, CT or MRI, with one channel or several",
        "http://medicaldecathlon.com/",
    ),
    "folder": Converter(
        "Own scans with and without labels: NIfTI, NRRD, DICOM or other formats, with file names given by patterns",
        "your own data",
    ),
}


def groups() -> dict[str, list[str]]:
    """Return the names of the trainers under each heading (`Trainer.group`): heading -> names.

    Headings and names are in the order of the dict `TRAINERS`.
    """
    found: dict[str, list[str]] = {}
    for name, trainer in TRAINERS.items():
        found.setdefault(trainer.group, []).append(name)
    return found
