"""Fixtures: sources in both layouts of the left atrium data, and an nnUNet_raw folder."""

import json
import locale

import h5py
import numpy as np
import pytest

from tests.dataset_conversion.la_sources import volumes, write_nrrd


@pytest.fixture
def raw(tmp_path, monkeypatch):
    folder = tmp_path / "raw"
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    monkeypatch.delenv("nnUNet_results", raising=False)
    return folder


@pytest.fixture
def nrrd_source(tmp_path):
    """Return a function that writes cases in the challenge's layout: foreground 255, spacing 1 in the header."""

    def make(identifiers, folder="Training Set", without_label=()):
        for number, identifier in enumerate(identifiers):
            image, label = volumes(number)
            write_nrrd(tmp_path / "source" / folder / identifier / "lgemri.nrrd", image)
            if identifier not in without_label:
                write_nrrd(tmp_path / "source" / folder / identifier / "laendo.nrrd", label * 255)
        return tmp_path / "source"

    return make


@pytest.fixture
def h5_source(tmp_path):
    """Return a function that writes cases in the layout of the h5 files."""

    def make(identifiers, folder="2018LA_Seg_Training Set"):
        for number, identifier in enumerate(identifiers):
            image, label = volumes(number)
            path = tmp_path / "source" / folder / identifier / "mri_norm2.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["image"], file["label"] = image.astype(np.float32) / 100 - 1, label
        return tmp_path / "source"

    return make


@pytest.fixture
def target(raw):
    return raw / "Dataset101_LA2018"


@pytest.fixture
def split_file(tmp_path):
    """Return a function that writes a split file from a JSON object or from text."""

    def write(content):
        path = tmp_path / "split.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture(autouse=True)
def _same_locale():
    """Restore the locale: writing DICOM and .vtk files sets it to C, in which text files are ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
