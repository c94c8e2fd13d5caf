"""Tiny data sets for each label space, in each configuration, for training steps of tens of milliseconds."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter

from nnunet_dycon.data.unlabeled import UnlabeledCases
from tests.tiny import write_volume

NESTED = {"whole": [1, 2, 3], "core": [2, 3], "inner": 3}
# name -> ID of the data set, labels in dataset.json, number of values in the label maps
LABEL_SPACES = {
    "two classes": (911, {"background": 0, "organ": 1}, 2),
    "many classes": (912, {"background": 0} | {f"part {value}": value for value in range(1, 7)}, 7),
    "ignore label": (913, {"background": 0, "organ": 1, "tumor": 2, "ignore": 3}, 4),
    "regions": (914, {"background": 0, **NESTED}, 4),
    "regions, ignore label": (915, {"background": 0, **NESTED, "ignore": 4}, 5),
}
# name -> plans, configuration in the plans
CONFIGURATIONS = {
    "2d": ("nnUNetPlans", "2d"),
    "3d_lowres": ("nnUNetPlans", "3d_lowres"),
    "3d_fullres": ("nnUNetPlans", "3d_fullres"),
    "anisotropic": ("nnUNetPlans", "3d_anisotropic"),
    "residual encoder M": ("nnUNetResEncUNetMPlans", "3d_fullres"),
    "residual encoder L": ("nnUNetResEncUNetLPlans", "3d_fullres"),
}
_LABELED, _UNLABELED = ("case_00", "case_01", "case_02"), ("scan_00", "scan_01")
_SHAPE = (16, 32, 32)  # Z, Y, X


def dataset_of(label_space: str) -> str:
    return f"Dataset{LABEL_SPACES[label_space][0]}_{''.join(filter(str.isalnum, label_space.title()))}"


def write_all(root: Path, fingerprint: dict) -> None:
    """Write, plan and preprocess all data sets with nnU-Net, with small patches and networks, in this process.

    Args:
        root: folder for nnUNet_raw and nnUNet_preprocessed.
        fingerprint: fingerprint of another data set, whose intensity statistics are used.
    """
    for label_space in LABEL_SPACES:
        raw, base = (root / folder / dataset_of(label_space) for folder in ("nnUNet_raw", "nnUNet_preprocessed"))
        _write_raw(raw, label_space)
        base.mkdir(parents=True)
        shapes = [list(_SHAPE)] * len(_LABELED)
        about = fingerprint | {"shapes_after_crop": shapes, "spacings": [[1.0, 1.0, 1.0]] * len(shapes)}
        (base / "dataset_fingerprint.json").write_text(json.dumps(about))
        (base / "dataset.json").write_bytes((raw / "dataset.json").read_bytes())
    planned_for = next(iter(LABEL_SPACES))
    for planner in ("ExperimentPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL"):
        plan_experiments([LABEL_SPACES[planned_for][0]], experiment_planner_class_name=planner)
    for name in {plans for plans, _ in CONFIGURATIONS.values()}:
        file = root / "nnUNet_preprocessed" / dataset_of(planned_for) / f"{name}.json"
        plans = _narrowed(json.loads(file.read_text()))
        for label_space in LABEL_SPACES:
            about = json.dumps(plans | {"dataset_name": dataset_of(label_space)})
            (root / "nnUNet_preprocessed" / dataset_of(label_space) / file.name).write_text(about)
    for label_space in LABEL_SPACES:
        _preprocess(root, label_space)


def _write_raw(folder: Path, label_space: str) -> None:
    """Write images of smooth noise and labels by its quantiles: one half background, the other half equal parts."""
    _, labels, values = LABEL_SPACES[label_space]
    for seed, case in enumerate(_LABELED + _UNLABELED):
        noise = gaussian_filter(np.random.default_rng(seed).normal(size=_SHAPE), (1.5, 3.0, 3.0))
        rank = noise.argsort(axis=None).argsort().reshape(_SHAPE) / noise.size
        label = np.where(rank < 0.5, 0, 1 + ((rank - 0.5) * 2 * (values - 1)).astype(int)).astype(np.uint8)
        is_labeled = case in _LABELED
        write_volume(
            (10 * rank).astype(np.float32), folder / f"images{'Tr' if is_labeled else 'Un'}/{case}_0000.nii.gz"
        )
        if is_labeled:
            write_volume(label, folder / "labelsTr" / f"{case}.nii.gz")
    about = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(_LABELED), "file_ending": ".nii.gz"}
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    order = {"regions_class_order": [1, 2, 3]} if regions else {}
    (folder / "dataset.json").write_text(json.dumps(about | order))


def _narrowed(plans: dict) -> dict:
    """Return plans with small patches and few features, and with the two configurations that nnU-Net did not plan."""
    configurations = plans["configurations"]
    fullres = configurations["3d_fullres"]
    configurations["3d_lowres"] = deepcopy(fullres) | {"spacing": [2.0, 2.0, 2.0]}
    configurations["3d_anisotropic"] = deepcopy(fullres) | {"spacing": [4.0, 1.0, 1.0]}
    patches = {"2d": [16, 16], "3d_lowres": [8, 16, 16], "3d_fullres": [16, 16, 16], "3d_anisotropic": [4, 32, 32]}
    for name, patch in patches.items():
        configuration = configurations[name]
        flat = name == "3d_anisotropic"
        configuration |= {"data_identifier": f"nnUNetPlans_{name}", "batch_size": 2, "patch_size": patch}
        arguments = configuration["architecture"]["arch_kwargs"]
        stride, kernel = ([1, 2, 2], [1, 3, 3]) if flat else ([2] * len(patch), [3] * len(patch))
        arguments |= {
            "n_stages": 4,
            "features_per_stage": [4, 6, 8, 8],
            # No stride of 8: features have a stride of 4, so that a patch has enough cells for contrastive losses.
            "strides": [[1] * len(patch), stride, stride, [1] * len(patch)],
            "kernel_sizes": [kernel] * 2 + [[3] * len(patch)] * 2,
        }
        for blocks in ("n_conv_per_stage", "n_blocks_per_stage"):
            if blocks in arguments:
                arguments[blocks] = arguments[blocks][:4]
        arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][:3]
    return plans


def _preprocess(root: Path, label_space: str) -> None:
    base, raw = (root / folder / dataset_of(label_space) for folder in ("nnUNet_preprocessed", "nnUNet_raw"))
    dataset_json = json.loads((base / "dataset.json").read_text())
    manager = PlansManager(str(base / "nnUNetPlans.json"))
    for plans, name in CONFIGURATIONS.values():
        if plans != "nnUNetPlans":
            continue  # the other plans use the same preprocessed data
        configuration = manager.get_configuration(name)
        folder = base / configuration.data_identifier
        folder.mkdir()
        preprocessor = configuration.preprocessor_class(verbose=False)
        for case in _LABELED:
            files = str(raw / "imagesTr" / f"{case}_0000.nii.gz"), str(raw / "labelsTr" / f"{case}.nii.gz")
            preprocessor.run_case_save(str(folder / case), [files[0]], files[1], manager, configuration, dataset_json)
        cases = UnlabeledCases(manager, name, dataset_json)
        with cases.locked() as lock:
            cases.build(1, lock)
