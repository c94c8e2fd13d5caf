"""Tests of preprocessing of unlabeled cases: equal to nnU-Net's, resumed, out of date, and invalid input."""

import gzip
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnunet_dycon.cli import main
from nnunet_dycon.data import unlabeled as module
from nnunet_dycon.data.image_checks import check_unit
from nnunet_dycon.data.unlabeled import UnlabeledCases, preprocess_unlabeled
from nnunet_dycon.errors import UsageError, UserError
from tests.tiny import UNLABELED, tiny_volume, write_volume


@pytest.fixture
def images(tiny) -> Path:
    return tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn"


@pytest.fixture
def cases(tiny) -> UnlabeledCases:
    return UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")


LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}  # instead of cubic interpolation


def change_plans(base: Path, **configuration) -> None:
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"].update(configuration)
    file.write_text(json.dumps(plans))


def test_unlabeled_images_are_preprocessed_like_labeled_ones(base, images):
    """A copy of a labeled image in imagesUn has the same preprocessed image, bit for bit."""
    shutil.copy(images.parent / "imagesTr" / "case_03_0000.nii.gz", images / "copy_0000.nii.gz")
    folder = preprocess_unlabeled("901", "3d_fullres")
    labeled = blosc2.open(str(base / "nnUNetPlans_3d_fullres" / "case_03.b2nd"))[:]
    np.testing.assert_array_equal(blosc2.open(str(folder / "copy.b2nd"))[:], labeled)


def test_preprocessed_folder_contains_no_labels(base):
    folder = base / "nnUNetPlans_3d_fullres_unlabeled"
    for case in UNLABELED:
        assert set(np.unique(blosc2.open(str(folder / f"{case}_seg.b2nd"))[:])) <= {-1, 0}
        assert "class_locations" not in pickle.loads((folder / f"{case}.pkl").read_bytes())


def test_folder_that_is_up_to_date_is_unchanged(base, cases):
    before = {file: file.stat().st_mtime_ns for file in cases.folder.iterdir()}
    assert cases.fault() is None
    assert main(["preprocess_unlabeled", "-d", "901", "-c", "3d_fullres"]) == 0
    assert {file: file.stat().st_mtime_ns for file in cases.folder.iterdir()} == before


@pytest.mark.parametrize("dataset", ["901", "Dataset901_Tiny"])
def test_files_do_not_depend_on_the_number_of_processes(base, cases, dataset):
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
def test_changed_plans_make_the_folder_out_of_date(base, change):
    change_plans(base, **change)
    cases = UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")
    assert cases.fault() == "the plans have changed"
    with pytest.raises(
        UserError, match="is out of date: the plans have changed; run: nnunet_dycon preprocess_unlabeled -d 901"
    ):
        cases.require(num_processes=1)


def test_patch_size_and_batch_size_do_not_make_the_folder_out_of_date(base):
    change_plans(base, patch_size=[16, 16, 16], batch_size=5)
    assert UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans").fault() is None


def test_changed_images_make_the_folder_out_of_date_until_preprocess_unlabeled_is_run(cases, images):
    image, _ = tiny_volume(99)
    write_volume(image, images / "scan_new_0000.nii.gz")
    assert "have changed" in cases.fault()
    with pytest.raises(UserError, match="is out of date"):
        cases.require(num_processes=1)
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 0
    assert cases.fault() is None
    assert cases.identifiers() == [*UNLABELED, "scan_new"]
    (images / "scan_new_0000.nii.gz").unlink()
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 0
    assert not (cases.folder / "scan_new.b2nd").exists()


@pytest.mark.parametrize("gone", ["imagesUn", "the variable"])
def test_preprocessed_folder_is_used_without_raw_images(cases, images, monkeypatch, gone):
    shutil.rmtree(images)
    if gone == "the variable":
        monkeypatch.delenv("nnUNet_raw")
    cases.require(num_processes=1)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: c.manifest_file.unlink(), "manifest.json is missing"),
        (lambda c: c.manifest_file.write_text("{"), "manifest.json is damaged"),
        (lambda c: c.manifest_file.write_text("[]"), "manifest.json is damaged"),
        (
            lambda c: c.manifest_file.write_text('{"files": {}, "digest": "", "format": 0}'),
            "it was written by another version of nnunet-dycon",
        ),
        (lambda c: (c.folder / "scan_01.b2nd").unlink(), "scan_01.b2nd is missing or empty"),
    ],
)
def test_damaged_folder_is_reported_and_rebuilt_by_preprocess_unlabeled(cases, damage, fault):
    damage(cases)
    assert cases.fault() == fault
    with pytest.raises(UserError, match="is out of date"):
        cases.require(num_processes=1)
    preprocess_unlabeled("901", "3d_fullres")
    assert cases.fault() is None


def test_training_preprocesses_unlabeled_cases(cases):
    shutil.rmtree(cases.folder)
    cases.require(num_processes=1)
    assert cases.fault() is None


def test_interrupted_preprocessing_resumes(cases, monkeypatch):
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
    resumed = []
    monkeypatch.setattr(
        module, "_preprocess_case", lambda job: (resumed.append(Path(job[-1]).name), preprocess(job))[1]
    )
    preprocess_unlabeled("901", "3d_fullres")
    assert sorted(done + resumed) == UNLABELED
    assert cases.fault() is None
    assert not list(cases.folder.parent.glob("*.partial"))


def test_preprocessing_ends_after_the_case_in_which_another_process_takes_over(cases, monkeypatch):
    """Both would write the same files."""
    shutil.rmtree(cases.folder)
    done = []

    def taken_over(job):
        done.append(job)
        cases.lock.file.write_text(json.dumps({"token": "other", "host": "node7", "pid": 1}))

    monkeypatch.setattr(module, "_preprocess_case", taken_over)
    with pytest.raises(UserError, match=r"another process \(host node7, process 1\) has taken over"):
        preprocess_unlabeled("901", "3d_fullres")
    assert len(done) == 1
    cases.lock.file.unlink()


def test_preprocessing_killed_while_writing_a_case_repeats_this_case(cases, monkeypatch):
    """Some files of the case exist, and blosc2 does not overwrite files."""
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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset.json", {"labels": {"background": 0, "organ": 1}}, '"file_ending" is None, but must start with a dot'),
        ("dataset.json", [], "does not contain an object"),
        ("nnUNetPlans.json", {}, "nnUNetPlans.json is damaged; plan again"),
        ("nnUNetPlans.json", [], "nnUNetPlans.json is damaged; plan again"),
    ],
)
def test_invalid_dataset_json_and_plans_are_errors(base, images, file, content, message):
    (base / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        preprocess_unlabeled("901", "3d_fullres")


def test_folder_that_cannot_be_entered_is_named(base, images, monkeypatch):
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled", ignore_errors=True)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"imagesUn cannot be entered; change its permissions"):
        preprocess_unlabeled("901", "3d_fullres")


def test_images_are_exactly_zero_outside_the_nonzero_region(base, images):
    """Resampling causes ringing at the border of the region, but the loader requires exact zeros."""
    image, _ = tiny_volume(50, shape=(30, 30, 30))
    from_center = np.stack(np.meshgrid(*[np.arange(30) - 14.5] * 3)).astype(float)
    image = np.where((from_center**2).sum(0) < 12**2, image + 20, 0).astype(np.float32)
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


def test_fingerprint_that_is_out_of_date_raises(base, images):
    """A label was removed after planning, but the fingerprint still contains statistics of this label."""
    folder = base / "nnUNetPlans_3d_fullres"
    for file in folder.glob("case_04*"):
        file.unlink()
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    message = r"fingerprint.json was made \(then 5 cases, now 4\); run: .*and_preprocess -d 901 --clean"
    with pytest.raises(UserError, match=message):
        preprocess_unlabeled("901", "3d_fullres")


def test_two_trainings_preprocess_unlabeled_cases_once(cases, monkeypatch):
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
    "additional channel": (
        lambda d: shutil.copy(d / "scan_00_0000.nii.gz", d / "scan_00_0001.nii.gz"),
        "unlabeled case scan_00 in .* has the files 0000, 0001, but the 1 channels .* require 0000",
    ),
    "wrong channel number": (
        lambda d: (d / "scan_00_0000.nii.gz").rename(d / "scan_00_0003.nii.gz"),
        "unlabeled case scan_00 in .* has the files 0003",
    ),
    "no channel number": (
        lambda d: (d / "scan_00_0000.nii.gz").rename(d / "scan.nii.gz"),
        r"scan.nii.gz is not named CASE_XXXX.nii.gz, as nnU-Net requires; rename it",
    ),
    "also labeled": (
        lambda d: shutil.copy(d / "scan_00_0000.nii.gz", d / "case_02_0000.nii.gz"),
        "1 case is both labeled and unlabeled: case_02; either remove it from",
    ),
    "truncated": (
        lambda d: (d / "scan_02_0000.nii.gz").write_bytes((d / "scan_02_0000.nii.gz").read_bytes()[:5000]),
        r"1 of 4 unlabeled cases cannot be used; repair or remove it: .*scan_02_0000.nii.gz \(Compressed file ended",
    ),
    "not gzip": (
        lambda d: (d / "scan_02_0000.nii.gz").write_bytes(b"no image"),
        r"scan_02_0000.nii.gz \(it is neither a gzip nor an uncompressed NIfTI",
    ),
    "empty": (
        lambda d: (d / "scan_02_0000.nii.gz").write_bytes(b""),
        r"scan_02_0000.nii.gz \(the file is empty\)",
    ),
    "NaN": (
        lambda d: write_volume(with_nan(tiny_volume(1)[0]), d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(it has NaN or infinite voxels\)",
    ),
    "valid gzip with half of the voxels": (
        lambda d: cut_inside(d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(it is truncated: expected 123232 bytes, found 61616\)",
    ),
    "intensities out of range": (
        lambda d: write_volume(tiny_volume(1)[0] * np.float32(1e30), d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(its intensities cannot be normalized",
    ),
    "constant": (
        lambda d: write_volume(np.full((24, 32, 40), 7, np.float32), d / "scan_02_0000.nii.gz"),
        r"scan_02_0000.nii.gz \(all voxels have the same value\)",
    ),
    "metres for millimetres": (
        lambda d: write_volume(tiny_volume(1)[0], d / "scan_02_0000.nii.gz", spacing=(0.001, 0.001, 0.001)),
        r"scan_02_0000.nii.gz \(its spacing, 0.001 x 0.001 x 0.001 mm, is 0.001 times that of",
    ),
    "micrometres for millimetres": (
        lambda d: write_volume(tiny_volume(1)[0], d / "scan_02_0000.nii.gz", spacing=(1e3, 1e3, 1e3)),
        r"scan_02_0000.nii.gz \(its spacing, 1000 x 1000 x 1000 mm, is 1000 times that of",
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


def test_completed_cases_are_kept_when_invalid_images_are_repaired_or_removed(cases, images, monkeypatch):
    change_plans(cases.folder.parent, resampling_fn_data_kwargs=LINEAR)
    for name in ("scan_01", "scan_02"):
        (images / f"{name}_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 4 unlabeled cases cannot be used"):
        preprocess_unlabeled("901", "3d_fullres")
    (images / "scan_01_0000.nii.gz").unlink()
    write_volume(tiny_volume(7)[0], images / "scan_02_0000.nii.gz")
    (images / "scan_03_0000.nii.gz").rename(images / "scan_04_0000.nii.gz")  # an image of another case
    resumed = []
    preprocess = module._preprocess_case
    monkeypatch.setattr(
        module, "_preprocess_case", lambda job: (resumed.append(Path(job[-1]).name), preprocess(job))[1]
    )
    folder = preprocess_unlabeled("901", "3d_fullres")
    assert resumed == ["scan_02", "scan_04"]
    assert sorted(file.name for file in folder.iterdir() if file.name != "manifest.json") == sorted(
        case + suffix for case in ("scan_00", "scan_02", "scan_04") for suffix in (".b2nd", "_seg.b2nd", ".pkl")
    )


def test_full_disk_is_not_reported_as_an_invalid_image(cases, images, monkeypatch):
    """blosc2 raises a RuntimeError if the disk is full."""
    change_plans(cases.folder.parent, resampling_fn_data_kwargs=LINEAR)

    def full(*arguments, **options):
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr("nnunetv2.training.dataloading.nnunet_dataset.blosc2.asarray", full)
    message = r"scan_00_0000.nii.gz: cannot be preprocessed \(Error while .*\); free disk space in .*run again"
    with pytest.raises(UserError, match=message) as raised:
        preprocess_unlabeled("901", "3d_fullres")
    assert "remove" not in str(raised.value)


def test_interrupted_preprocessing_with_other_plans_is_removed(cases):
    outdated = cases.folder.with_name(f"{cases.folder.name}.1_0123456789ab.partial")
    outdated.mkdir()
    (outdated / "scan_00.b2nd").write_bytes(b"x")
    change_plans(cases.folder.parent, resampling_fn_data_kwargs=LINEAR)
    preprocess_unlabeled("901", "3d_fullres")
    assert not outdated.exists()


def test_folder_that_is_up_to_date_may_be_read_only(cases, monkeypatch):
    def read_only(folder):
        raise UserError("cannot be written to")

    monkeypatch.setattr(module, "require_writable", read_only)
    assert preprocess_unlabeled("901", "3d_fullres") == cases.folder
    shutil.rmtree(cases.folder)
    with pytest.raises(UserError, match="cannot be written to"):
        preprocess_unlabeled("901", "3d_fullres")


@pytest.mark.parametrize(("damage", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_invalid_images_raise_and_keep_the_old_folder(cases, images, capsys, damage, message):
    before = {file.name: file.read_bytes() for file in cases.folder.iterdir()}
    damage(images)
    change_plans(cases.folder.parent, resampling_fn_data_kwargs=LINEAR)  # to make the folder out of date
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
            "OtherPlans.json does not exist; name existing plans, or create these with nnUNetv2_plan_experiment",
        ),
        (("901", "3d_ultrares", "nnUNetPlans"), "has no configuration 3d_ultrares"),
    ],
)
def test_unknown_dataset_plans_or_configuration_raise(tiny, arguments, message):
    with pytest.raises(UsageError, match=message):
        UnlabeledCases.of_dataset(*arguments)


def test_nan_in_nrrd_raises(base, images):
    """A single NaN voxel would make the whole normalized image NaN."""
    dataset = json.loads((base / "dataset.json").read_text())
    (base / "dataset.json").write_text(json.dumps(dataset | {"file_ending": ".nrrd"}))
    image, _ = tiny_volume(2)
    image[3, 3, 3] = np.nan
    write_volume(image, images / "bad_0000.nrrd")
    with pytest.raises(UserError, match=r"bad_0000.nrrd .it has NaN or infinite voxels"):
        preprocess_unlabeled("901", "3d_fullres")


@pytest.mark.parametrize("name", ["nnUNetPlans.json", "dataset.json"])
def test_damaged_plans_raise(base, capsys, name):
    (base / name).write_text("{")
    assert main(["preprocess_unlabeled", "-d", "901"]) == 1
    assert f"{name} is damaged" in capsys.readouterr().err


def test_invalid_default_number_of_processes_raises(tiny, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_def_n_proc", "many")
    assert main(["preprocess_unlabeled", "-d", "901"]) == 2
    assert "nnUNet_def_n_proc must be a positive number, got 'many'" in capsys.readouterr().err
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 0


def test_missing_environment_variable_raises(tiny, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert main(["preprocess_unlabeled", "-d", "901"]) == 2
    assert "the environment variable nnUNet_preprocessed is not set" in capsys.readouterr().err


KILLED_AT = {
    "first rename": ("rename", 1),
    "second rename": ("rename", 2),
    "removal of the first record": ("unlink", 1),
    "removal of the replaced folder": ("rmtree", 1),
}


@pytest.mark.parametrize(("function", "count"), KILLED_AT.values(), ids=KILLED_AT)
def test_kill_at_the_end_of_preprocessing_loses_nothing(cases, images, monkeypatch, function, count):
    """Every state is usable: the old folder, the new one, or an unfinished one that the next call completes."""
    shutil.copy(images / "scan_00_0000.nii.gz", images / "scan_new_0000.nii.gz")
    calls = []
    name = {"rename": "os.rename", "unlink": "pathlib.Path.unlink", "rmtree": "shutil.rmtree"}[function]
    original = {"rename": os.rename, "unlink": Path.unlink, "rmtree": shutil.rmtree}[function]

    class Killed(BaseException):
        pass

    def killed(path, *arguments, **options):
        if {"rename": "_unlabeled", "unlink": f"{cases.folder}/scan", "rmtree": ".replaced"}[function] in str(path):
            calls.append(path)
            if len(calls) == count:
                raise Killed
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(name, killed)
        with pytest.raises(Killed):
            preprocess_unlabeled("901", "3d_fullres")
    monkeypatch.setattr(module, "_preprocess_case", lambda job: pytest.fail("a finished case is preprocessed again"))
    assert cases.folder.is_dir() == ((function, count) != ("rename", 2))
    assert len(preprocess_unlabeled("901", "3d_fullres").name) > 0
    assert cases.fault() is None
    assert cases.identifiers() == [*UNLABELED, "scan_new"]
    left = [file.name for file in cases.folder.parent.iterdir() if cases.folder.name in file.name]
    if function == "rename":
        assert left == [cases.folder.name]


def test_folder_that_a_training_uses_is_not_replaced(cases, images):
    shutil.copy(images / "scan_00_0000.nii.gz", images / "scan_new_0000.nii.gz")
    use = cases.use("the training in fold_0")
    use.acquire()
    with pytest.raises(UserError, match=rf"is used by a training \(host .*, process {os.getpid()}\) and cannot be"):
        preprocess_unlabeled("901", "3d_fullres")
    use.close()
    preprocess_unlabeled("901", "3d_fullres")
    assert cases.fault() is None


def test_killed_training_does_not_keep_the_folder(cases, images):
    shutil.copy(images / "scan_00_0000.nii.gz", images / "scan_new_0000.nii.gz")
    use = cases.use("the training in fold_0")
    use.acquire()
    content = json.loads(use.file.read_text())
    use.file.write_text(json.dumps(content | {"started": "0"}))  # another process had this ID
    preprocess_unlabeled("901", "3d_fullres")
    assert cases.fault() is None
    assert not use.file.exists()


def test_broken_links_in_the_raw_folder_do_not_stop_a_training_but_a_new_preprocessing(cases, images, capsys):
    """The storage behind the links is not mounted any more."""
    image = images / "scan_01_0000.nii.gz"
    image.unlink()
    image.symlink_to(images.parent / "gone" / image.name)
    assert cases.fault() is None
    cases.require(num_processes=1)
    change_plans(cases.folder.parent, resampling_fn_data_kwargs=LINEAR)
    assert main(["preprocess_unlabeled", "-d", "901", "-np", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"1 image of an unlabeled case cannot be read (a broken link, or no permission); repair or remove it: {image}"
        in error
    )


def test_spacing_of_0_is_named(cases, images):
    with pytest.raises(ValueError, match=r"its spacing \(0.0, 1.0, 1.0\) is not finite and positive"):
        check_unit((0.0, 1.0, 1.0), (1.0, 1.0, 1.0))
