"""Preprocessing of unlabeled cases: as nnU-Net does it, whole or not at all, and never stale."""

import gzip
import json
import pickle
import shutil
import threading
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnunet_dycon.cli import main
from nnunet_dycon.data import unlabeled as module
from nnunet_dycon.data.unlabeled import UnlabeledCases, preprocess_unlabeled
from nnunet_dycon.errors import UsageError, UserError
from tests.tiny import UNLABELED, tiny_volume, write_volume


@pytest.fixture
def images(tiny) -> Path:
    return tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn"


@pytest.fixture
def cases(tiny) -> UnlabeledCases:
    return UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")


def change_plans(base: Path, **configuration) -> None:
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"].update(configuration)
    file.write_text(json.dumps(plans))


def test_images_are_preprocessed_as_the_labeled_ones(base, images):
    """The image of a labeled case, given as an unlabeled one, comes out the same to the last bit."""
    shutil.copy(images.parent / "imagesTr" / "case_03_0000.nii.gz", images / "copy_0000.nii.gz")
    folder = preprocess_unlabeled("901", "3d_fullres")
    labeled = blosc2.open(str(base / "nnUNetPlans_3d_fullres" / "case_03.b2nd"))[:]
    np.testing.assert_array_equal(blosc2.open(str(folder / "copy.b2nd"))[:], labeled)


def test_no_label_can_be_found_in_the_folder(base):
    folder = base / "nnUNetPlans_3d_fullres_unlabeled"
    for case in UNLABELED:
        assert set(np.unique(blosc2.open(str(folder / f"{case}_seg.b2nd"))[:])) <= {-1, 0}
        assert "class_locations" not in pickle.loads((folder / f"{case}.pkl").read_bytes())


def test_what_is_up_to_date_is_left_alone(base, cases):
    before = {file: file.stat().st_mtime_ns for file in cases.folder.iterdir()}
    assert cases.fault() is None
    assert main(["preprocess_unlabeled", "-d", "901", "-c", "3d_fullres"]) == 0
    assert {file: file.stat().st_mtime_ns for file in cases.folder.iterdir()} == before


@pytest.mark.parametrize("dataset", ["901", "Dataset901_Tiny"])
def test_several_processes_do_the_same(base, cases, dataset):
    before = {file.name: file.read_bytes() for file in cases.folder.iterdir()}
    shutil.rmtree(cases.folder)
    folder = preprocess_unlabeled(dataset, "3d_fullres", num_processes=1 if dataset == "901" else 2)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


CHANGES = {
    "spacing": {"spacing": [2.0, 1.0, 1.0]},
    "normalization": {"normalization_schemes": ["CTNormalization"]},
    "resampling": {"resampling_fn_data_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}},
    "preprocessor": {"preprocessor_name": "AnotherPreprocessor"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_plans_make_it_stale(base, change):
    change_plans(base, **change)
    cases = UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")
    assert cases.fault() == "the plans have changed"
    with pytest.raises(
        UserError, match="is stale: the plans have changed; run: nnunet_dycon preprocess_unlabeled -d 901"
    ):
        cases.require(num_processes=1)


def test_what_preprocessing_does_not_read_leaves_it_valid(base):
    change_plans(base, patch_size=[16, 16, 16], batch_size=5)
    assert UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans").fault() is None


def test_other_images_make_it_stale_and_the_command_renews_it(cases, images):
    image, _ = tiny_volume(99)
    write_volume(image, images / "scan_new_0000.nii.gz")
    assert "have changed" in cases.fault()
    with pytest.raises(UserError, match="is stale"):
        cases.require(num_processes=1)
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 0
    assert cases.fault() is None
    assert cases.identifiers() == [*UNLABELED, "scan_new"]
    (images / "scan_new_0000.nii.gz").unlink()
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 0
    assert not (cases.folder / "scan_new.b2nd").exists()


@pytest.mark.parametrize("gone", ["imagesUn", "the variable"])
def test_without_the_raw_images_a_matching_folder_is_used(cases, images, monkeypatch, gone):
    shutil.rmtree(images)
    if gone == "the variable":
        monkeypatch.delenv("nnUNet_raw")
    cases.require(num_processes=1)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: c.manifest_file.unlink(), "nnUNetPlans_3d_fullres_unlabeled.json is missing"),
        (lambda c: c.manifest_file.write_text("{"), "nnUNetPlans_3d_fullres_unlabeled.json is damaged"),
        (lambda c: c.manifest_file.write_text("[]"), "nnUNetPlans_3d_fullres_unlabeled.json is damaged"),
        (
            lambda c: c.manifest_file.write_text('{"files": {}, "digest": "", "format": 0}'),
            "another version of nnunet-dycon made it",
        ),
        (lambda c: (c.folder / "scan_01.b2nd").unlink(), "scan_01.b2nd is missing or empty"),
    ],
)
def test_damage_is_named_and_mended_by_the_command(cases, damage, fault):
    damage(cases)
    assert cases.fault() == fault
    with pytest.raises(UserError, match="is stale"):
        cases.require(num_processes=1)
    preprocess_unlabeled("901", "3d_fullres")
    assert cases.fault() is None


def test_training_builds_what_is_missing(cases):
    shutil.rmtree(cases.folder)
    cases.require(num_processes=1)
    assert cases.fault() is None


def test_an_interrupted_build_goes_on_where_it_was(cases, monkeypatch):
    shutil.rmtree(cases.folder)
    done = []
    preprocess = module._preprocess_case

    def interrupted(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(Path(job[-1]).name)
        preprocess(job)

    monkeypatch.setattr(module, "_preprocess_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess_unlabeled("901", "3d_fullres")
    assert not cases.folder.exists()
    again = []
    monkeypatch.setattr(module, "_preprocess_case", lambda job: (again.append(Path(job[-1]).name), preprocess(job))[1])
    preprocess_unlabeled("901", "3d_fullres")
    assert sorted(done + again) == UNLABELED
    assert cases.fault() is None
    assert not list(cases.folder.parent.glob("*.partial"))


def test_a_build_killed_within_a_case_goes_on_with_that_case(cases, monkeypatch):
    """nnU-Net has written a part of the case then, and blosc2 does not write over it."""
    before = {file.name: file.read_bytes() for file in cases.folder.iterdir()}
    shutil.rmtree(cases.folder)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunetv2.training.dataloading.nnunet_dataset.write_pickle", killed)  # after both arrays
        with pytest.raises(KeyboardInterrupt):
            preprocess_unlabeled("901", "3d_fullres")
    (partial,) = cases.folder.parent.glob("*.partial")
    assert len(list(partial.glob("*.b2nd"))) == 2
    preprocess_unlabeled("901", "3d_fullres")
    assert {file.name: file.read_bytes() for file in cases.folder.iterdir()} == before


def test_outside_of_the_nonzero_region_images_are_exactly_zero(base, images):
    """Resampling rings across its border; the loader looks for exact zeros."""
    image, _ = tiny_volume(50, shape=(30, 30, 30))
    away = np.stack(np.meshgrid(*[np.arange(30) - 14.5] * 3)).astype(float)
    image = np.where((away**2).sum(0) < 12**2, image + 20, 0).astype(np.float32)
    for file in images.iterdir():
        file.unlink()
    write_volume(image, images / "stripped_0000.nii.gz", spacing=(1.3, 1.3, 1.3))
    change_plans(base, use_mask_for_norm=[True])
    folder = preprocess_unlabeled("901", "3d_fullres")
    data = blosc2.open(str(folder / "stripped.b2nd"))[:]
    outside = blosc2.open(str(folder / "stripped_seg.b2nd"))[:] < 0
    assert 0 < outside.mean() < 1
    assert (data[outside] == 0).all()
    assert (data[~outside] != 0).mean() > 0.99


def test_a_stale_fingerprint_is_refused(base, images):
    """A case that was planned on has lost its label: the label would go on speaking through the plans."""
    folder = base / "nnUNetPlans_3d_fullres"
    for file in folder.glob("case_04*"):
        file.unlink()
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    message = r"dataset_fingerprint.json was made from 5 cases, which are not the 4 .*and_preprocess -d 901 --clean"
    with pytest.raises(UserError, match=message):
        preprocess_unlabeled("901", "3d_fullres")


def test_two_trainings_at_once_build_it_once(cases, monkeypatch):
    shutil.rmtree(cases.folder)
    preprocessed = []
    preprocess = module._preprocess_case
    monkeypatch.setattr(module, "_preprocess_case", lambda job: (preprocessed.append(job[-1]), preprocess(job))[1])
    threads = [threading.Thread(target=cases.require, args=(1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(preprocessed) == len(UNLABELED)
    assert cases.fault() is None


BAD_IMAGES = {
    "none": (lambda d: [file.unlink() for file in d.iterdir()], "no unlabeled cases: .*imagesUn has no file"),
    "no folder": (shutil.rmtree, "no unlabeled cases: .*imagesUn has no file"),
    "a channel too many": (
        lambda d: shutil.copy(d / "scan_00_0000.nii.gz", d / "scan_00_0001.nii.gz"),
        "unlabeled case scan_00 in .* has the channels 0000, 0001, but dataset.json names 1: 0000",
    ),
    "a wrong channel": (
        lambda d: (d / "scan_00_0000.nii.gz").rename(d / "scan_00_0003.nii.gz"),
        "unlabeled case scan_00 in .* has the channels 0003",
    ),
    "no channel": (
        lambda d: (d / "scan_00_0000.nii.gz").rename(d / "scan.nii.gz"),
        r"scan.nii.gz is not named as nnU-Net wants it: CASE_XXXX.nii.gz",
    ),
    "labeled too": (
        lambda d: shutil.copy(d / "scan_00_0000.nii.gz", d / "case_02_0000.nii.gz"),
        "1 cases are both labeled and unlabeled, case_02 the first",
    ),
    "cut short": (
        lambda d: (d / "scan_02_0000.nii.gz").write_bytes((d / "scan_02_0000.nii.gz").read_bytes()[:5000]),
        r"1 of 4 unlabeled cases cannot be used; repair or remove them: .*scan_02_0000.nii.gz \(Compressed file ended",
    ),
    "garbage": (
        lambda d: (d / "scan_02_0000.nii.gz").write_bytes(b"no image"),
        r"scan_02_0000.nii.gz \(Not a gzipped file",
    ),
    "zero size": (
        lambda d: (d / "scan_02_0000.nii.gz").write_bytes(b""),
        r"scan_02_0000.nii.gz \(the file is empty\)",
    ),
    "NaN": (
        lambda d: write_volume(with_nan(tiny_volume(1)[0]), d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(it has NaN or infinite voxels\)",
    ),
    "half of the voxels, well compressed": (
        lambda d: cut_inside(d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(Expected .* bytes, got",
    ),
    "values out of range": (
        lambda d: write_volume(tiny_volume(1)[0] * np.float32(1e30), d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(its values are so large that nothing is left",
    ),
    "constant": (
        lambda d: write_volume(np.full((24, 32, 40), 7, np.float32), d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(it is constant\)",
    ),
    "metres for millimetres": (
        lambda d: write_volume(tiny_volume(1)[0], d / "scan_02_0000.nii.gz", spacing=(0.001, 0.001, 0.001)),
        r"scan_02_0000.nii.gz \(its voxels of 0.001 x 0.001 x 0.001 mm are 0.001 times as long as",
    ),
    "micrometres for millimetres": (
        lambda d: write_volume(tiny_volume(1)[0], d / "scan_02_0000.nii.gz", spacing=(1e3, 1e3, 1e3)),
        r"scan_02_0000.nii.gz \(its voxels of 1000 x 1000 x 1000 mm are 1e\+03 times as long as",
    ),
    "four dimensions": (
        lambda d: write_volume(np.stack([tiny_volume(1)[0]] * 3), d / "scan_02_0000.nii.gz", spacing=(1, 1, 1, 1)),
        r"scan_02_0000.nii.gz \(3 channels or time points, but dataset.json names 1 channels\)",
    ),
    "several": (
        lambda d: [(d / f"scan_0{i}_0000.nii.gz").write_bytes(b"") for i in (1, 3)],
        r"2 of 4 unlabeled .*scan_01_0000.nii.gz \(the file is empty\); .*scan_03_0000.nii.gz \(the file is empty\)$",
    ),
}


def with_nan(image: np.ndarray) -> np.ndarray:
    image[3, 4, 5] = np.nan
    return image


def cut_inside(file: Path) -> None:
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[: len(content) // 2]))


def test_repairing_or_removing_a_bad_image_keeps_what_is_done(cases, images, monkeypatch):
    change_plans(cases.folder.parent, spacing=[2.0, 1.0, 1.0])
    for name in ("scan_01", "scan_02"):
        (images / f"{name}_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 4 unlabeled cases cannot be used"):
        preprocess_unlabeled("901", "3d_fullres")
    (images / "scan_01_0000.nii.gz").unlink()
    write_volume(tiny_volume(7)[0], images / "scan_02_0000.nii.gz")
    (images / "scan_03_0000.nii.gz").rename(images / "scan_04_0000.nii.gz")  # an image of another case
    again = []
    preprocess = module._preprocess_case
    monkeypatch.setattr(module, "_preprocess_case", lambda job: (again.append(Path(job[-1]).name), preprocess(job))[1])
    folder = preprocess_unlabeled("901", "3d_fullres")
    assert again == ["scan_02", "scan_04"]
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        case + suffix for case in ("scan_00", "scan_02", "scan_04") for suffix in (".b2nd", "_seg.b2nd", ".pkl")
    )


def test_a_machine_that_fails_blames_no_image(cases, images, monkeypatch):
    """blosc2 tells of a full disk by a RuntimeError."""
    change_plans(cases.folder.parent, spacing=[2.0, 1.0, 1.0])

    def full(*arguments, **options):
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr("nnunetv2.training.dataloading.nnunet_dataset.blosc2.asarray", full)
    message = r"scan_00_0000.nii.gz: cannot be preprocessed \(Error while .*\); make room in .*run again"
    with pytest.raises(UserError, match=message) as told:
        preprocess_unlabeled("901", "3d_fullres")
    assert "remove" not in str(told.value)


def test_builds_of_other_plans_are_cleaned_up(cases):
    outdated = cases.folder.with_name(f"{cases.folder.name}.1_0123456789ab.partial")
    outdated.mkdir()
    (outdated / "scan_00.b2nd").write_bytes(b"x")
    change_plans(cases.folder.parent, spacing=[2.0, 1.0, 1.0])
    preprocess_unlabeled("901", "3d_fullres")
    assert not outdated.exists()


def test_what_is_up_to_date_needs_no_lock(cases, monkeypatch):
    """As where nnUNet_preprocessed cannot be written to."""

    def read_only(folder):
        raise UserError("cannot be written to")

    monkeypatch.setattr(module, "require_writable", read_only)
    assert preprocess_unlabeled("901", "3d_fullres") == cases.folder
    shutil.rmtree(cases.folder)
    with pytest.raises(UserError, match="cannot be written to"):
        preprocess_unlabeled("901", "3d_fullres")


@pytest.mark.parametrize(("damage", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images_are_named_in_one_line_and_nothing_is_lost(cases, images, capsys, damage, message):
    before = {file.name: file.read_bytes() for file in cases.folder.iterdir()}
    damage(images)
    change_plans(cases.folder.parent, spacing=[2.0, 1.0, 1.0])  # stale, so that there is something to do
    capsys.readouterr()
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet_dycon: error:")]
    assert len(errors) == 1
    with pytest.raises(UserError, match=message):
        preprocess_unlabeled("901", "3d_fullres")
    assert {file.name: file.read_bytes() for file in cases.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("902", "3d_fullres", "nnUNetPlans"), "there is no data set 902"),
        (
            ("901", "3d_fullres", "OtherPlans"),
            "OtherPlans.json does not exist; name plans that there are, or make these with nnUNetv2_plan_experiment",
        ),
        (("901", "3d_ultrares", "nnUNetPlans"), "has no configuration 3d_ultrares"),
    ],
)
def test_wrong_arguments_are_named(tiny, arguments, message):
    with pytest.raises(UsageError, match=message):
        UnlabeledCases.of_dataset(*arguments)


def test_an_image_with_nan_is_named(base, images):
    """One such voxel would make the whole normalised image NaN."""
    dataset = json.loads((base / "dataset.json").read_text())
    (base / "dataset.json").write_text(json.dumps(dataset | {"file_ending": ".nrrd"}))
    image, _ = tiny_volume(2)
    image[3, 3, 3] = np.nan
    write_volume(image, images / "bad_0000.nrrd")
    with pytest.raises(UserError, match=r"bad_0000.nrrd .it has NaN or infinite voxels"):
        preprocess_unlabeled("901", "3d_fullres")


@pytest.mark.parametrize("name", ["nnUNetPlans.json", "dataset.json"])
def test_damaged_plans_are_named(base, capsys, name):
    (base / name).write_text("{")
    assert main(["preprocess_unlabeled", "-d", "901"]) == 1
    assert f"{name} is damaged" in capsys.readouterr().err


def test_a_wrong_number_of_processes_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_def_n_proc", "many")
    assert main(["preprocess_unlabeled", "-d", "901"]) == 2
    assert "nnUNet_def_n_proc must be a positive number, got 'many'" in capsys.readouterr().err
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 0


def test_a_missing_variable_is_named(tiny, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert main(["preprocess_unlabeled", "-d", "901"]) == 2
    assert "the environment variable nnUNet_preprocessed is not set" in capsys.readouterr().err
