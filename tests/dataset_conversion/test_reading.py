"""Tests of listing the files below a folder, including links."""

import pytest

from nnunet_dycon.dataset_conversion import brats19, folder, isles22, pancreas_ct
from nnunet_dycon.dataset_conversion.reading import entries_below


def touch(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def test_links_to_folders_are_followed_and_no_folder_is_entered_twice(tmp_path):
    source = tmp_path / "source"
    touch(source / "b" / "1.nii")
    touch(tmp_path / "elsewhere" / "c" / "2.nii")
    (tmp_path / "elsewhere" / "c" / "up").symlink_to(tmp_path / "elsewhere")
    (source / "a").symlink_to(source / "b")
    (source / "b" / "loop").symlink_to(source)
    (source / "b" / "out").symlink_to(tmp_path)
    (source / "d").symlink_to(tmp_path / "elsewhere")
    (source / "gone").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(source).as_posix() for path in entries_below(source)]
    assert found == ["a", "b", "b/1.nii", "b/loop", "b/out", "d", "d/c", "d/c/2.nii", "d/c/up", "gone"]


@pytest.mark.parametrize(
    ("converter", "files", "options"),
    [
        (brats19, ["BraTS19_A/BraTS19_A_flair.nii"], {"modalities": "flair"}),
        (brats19, ["data/BraTS19_A.h5"], {}),
        (folder, ["c/a.nii"], {"channel": ["CT=**/{case}.nii"]}),
        (isles22, ["sub-strokecase0001_ses-0001_dwi.nii.gz"], {"modalities": "dwi"}),
        (pancreas_ct, ["PANCREAS_0001.nii", "label0001.nii"], {}),
        (pancreas_ct, ["0001.h5"], {}),
    ],
)
def test_every_converter_finds_cases_behind_links(tmp_path, converter, files, options):
    for name in files:
        touch(tmp_path / "elsewhere" / name)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(converter.plan(tmp_path / "source", **options).training) == 1
