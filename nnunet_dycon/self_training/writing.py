"""Writing of a data set with pseudo-labels, in nnU-Net's format."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_dycon import __version__
from nnunet_dycon.data.dataset_json import ignore_label, label_values
from nnunet_dycon.data.image_reading import files_with_ending, image_files
from nnunet_dycon.errors import UsageError, UserError, explained, some
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import link_or_copy, new_folder, replacing

PREFIX = "pseudo_"  # of the identifiers of pseudo-labeled cases
PREDICTED = "pseudo_labels"  # folder of the predictions of all unlabeled cases
RECORD = "pseudo_labels.json"
UNLABELED = "imagesUn"
_SPLITS = "splits_final.json"
_FOLDS = 5


@dataclass(frozen=True)
class Content:
    """Sources of the files of the new data set, which `pseudo_label` writes.

    Attributes:
        source: nnUNet_raw/DatasetXXX_Name with the annotated and the unlabeled cases.
        about: content of its dataset.json.
        cases: case identifier -> image files of the unlabeled cases.
        plans: name of the plans to copy; None if the new data set is planned anew.
    """

    source: Path
    about: dict[str, Any]
    cases: Mapping[str, Sequence[Path]]
    plans: str | None

    @property
    def preprocessed(self) -> Path:
        return nnunet_folder("nnUNet_preprocessed") / self.source.name

    @property
    def annotated(self) -> list[str]:
        """Identifiers of the annotated cases, sorted."""
        ending = self.about["file_ending"]
        return [file.name.removesuffix(ending) for file in files_with_ending(self.source / "labelsTr", ending)]

    @property
    def ignore_value(self) -> int:
        """Value of the ignore label: that of the source, or a new value if the source has no ignore label."""
        existing = ignore_label(self.about)
        return max(label_values(self.about)) + 1 if existing is None else existing

    @property
    def splits(self) -> list[dict[str, list[str]]]:
        """Content of the source's splits_final.json; an empty list if there is none.

        Raises:
            UserError: the file is damaged, or lists cases that are not annotated.
        """
        file = self.preprocessed / _SPLITS
        if not file.is_file():
            return []
        remedy = "repair it, or remove it for a new split"
        with explained((OSError, ValueError, KeyError, TypeError), f"{file} is not a list of folds; {remedy}"):
            splits = [{part: list(split[part]) for part in ("train", "val")} for split in json.loads(file.read_text())]
            listed = set(chain(*(split[part] for split in splits for part in split)))
        if unknown := sorted(listed - set(self.annotated)):
            raise UserError(f"{file} lists cases without a label in labelsTr: {some(unknown)}; {remedy}")
        return splits

    def check(self) -> None:
        """Check that the source can be used, that the files to copy exist, and that no name would be used twice.

        Raises:
            UsageError: there is no annotated case, the source is a result of `pseudo_label`, the plans to copy do not
                exist, or an annotated case has the name pseudo_CASE that an unlabeled CASE gets in the new data set.
            UserError: images of an annotated case are missing, a case is annotated and unlabeled, or splits_final.json
                cannot be used.
        """
        if original := self.about.get("pseudo_labels_of"):
            raise UsageError(f"{self.source} has pseudo-labels already; give the data set of their origin, {original}")
        annotated = self.annotated
        if not annotated:
            raise UsageError(f"{self.source / 'labelsTr'} has no label files; pseudo-labels need annotated cases, too")
        images = image_files(self.source / "imagesTr", self.about, "labeled")
        if missing := sorted(set(annotated) - images.keys()):
            raise UserError(f"{self.source / 'imagesTr'} has no images of {some(missing)}; copy them, or remove labels")
        if both := sorted((set(annotated) | images.keys()) & self.cases.keys()):
            raise UserError(f"{some(both)} in both imagesTr and {UNLABELED} of {self.source}; remove one of both")
        if taken := sorted(set(annotated) & {PREFIX + case for case in self.cases}):
            raise UsageError(
                f"{self.source / 'labelsTr'} has {some(taken)}, which are the names of new pseudo-labeled cases; "
                "rename these cases in imagesTr and labelsTr"
            )
        plans = self.preprocessed / f"{self.plans}.json"
        if self.plans is not None and not plans.is_file():
            raise UsageError(f"{plans} does not exist; run nnUNetv2_plan_and_preprocess, or choose other plans with -p")
        _ = self.splits

    def digest(self) -> str:
        """Return a hash of dataset.json, and of names, sizes and modification times of all used images and labels."""
        ending = self.about["file_ending"]
        images = image_files(self.source / "imagesTr", self.about, "labeled")
        labels = [self.source / "labelsTr" / f"{case}{ending}" for case in self.annotated]
        files = chain(*images.values(), labels, *self.cases.values())
        return hashlib.sha256(json.dumps([_stamps(files), self.about]).encode()).hexdigest()

    def digest_of_unlabeled(self) -> str:
        """Return a hash of names, sizes and modification times of the unlabeled images."""
        return hashlib.sha256(json.dumps(_stamps(chain(*self.cases.values()))).encode()).hexdigest()


def _stamps(files: Iterable[Path]) -> list[tuple[str, str, int, int]]:
    """Return folder name, file name, size in bytes and modification time in ns of each file."""
    found = [(file, file.stat()) for file in files]
    return [(file.parent.name, file.name, status.st_size, status.st_mtime_ns) for file, status in found]


def result_name(source: str, dataset_id: int) -> str:
    """Return the name of the data set with the pseudo-labels of a source, such as Dataset111_LA2018_PseudoLabels.

    Args:
        source: name of the source, such as Dataset101_LA2018.
        dataset_id: ID of the new data set.
    """
    return f"Dataset{dataset_id:03d}_{source[len('Dataset000_') :]}_PseudoLabels"


def write_raw(
    content: Content, kept: Sequence[str], record: dict[str, Any], work: Path, folder: Path, *, has_ignored: bool
) -> None:
    """Write nnUNet_raw/DatasetXXX_Name_PseudoLabels under a temporary name, and rename it.

    Images are hard links, or copies if the file system does not support links. Labels are copies, so that a label can
    be corrected in one data set without changing another one.

    Args:
        content: sources of the files.
        kept: identifiers of the unlabeled cases whose pseudo-labels become labels.
        record: content of pseudo_labels.json.
        work: folder with pseudo_labels/CASE, pseudo_labels.png and, if `has_ignored`, confident/CASE.
        folder: the folder to write.
        has_ignored: whether to use confident/CASE, in which some voxels have the ignore label, as labels.
    """
    ending = content.about["file_ending"]
    chosen = set(kept)
    with new_folder(folder) as partial:
        for name in ("imagesTr", "labelsTr", UNLABELED, PREDICTED):
            (partial / name).mkdir()
        for file in chain(*image_files(content.source / "imagesTr", content.about, "labeled").values()):
            link_or_copy(file, partial / "imagesTr" / file.name)
        for case in content.annotated:
            shutil.copy(content.source / "labelsTr" / f"{case}{ending}", partial / "labelsTr")
        for case, files in content.cases.items():
            target, prefix = (partial / "imagesTr", PREFIX) if case in chosen else (partial / UNLABELED, "")
            for file in files:
                link_or_copy(file, target / f"{prefix}{file.name}")
            shutil.copy(work / PREDICTED / f"{case}{ending}", partial / PREDICTED)
        for case in kept:
            label = work / ("confident" if has_ignored else PREDICTED) / f"{case}{ending}"
            shutil.copy(label, partial / "labelsTr" / f"{PREFIX}{case}{ending}")
        if (page := work / "pseudo_labels.png").is_file():
            shutil.copy(page, partial)
        about = content.about | {
            "numTraining": len(content.annotated) + len(kept),
            "pseudo_labels_of": content.source.name,
        }
        if has_ignored:
            about["labels"] = about["labels"] | {"ignore": content.ignore_value}
        splits = folds(content.annotated, [PREFIX + case for case in kept], content.splits)
        record = {"version": __version__, **record}
        for name, value in (("dataset.json", about), (RECORD, record), (_SPLITS, splits)):
            (partial / name).write_text(json.dumps(value, indent=4))


def folds(
    annotated: Sequence[str], pseudo_labeled: Sequence[str], existing: Sequence[dict[str, list[str]]] = ()
) -> list[dict[str, list[str]]]:
    """Return the content of splits_final.json: at least five folds with only annotated cases for validation.

    An existing split is kept: the pseudo-labeled cases are added to the training cases of each fold. If it has fewer
    than five folds, they are repeated. Without a split, the annotated cases are split into five folds; with fewer than
    five annotated cases, each fold is validated on one case, and some cases are used for validation in several folds.

    Args:
        annotated: identifiers of the annotated cases.
        pseudo_labeled: identifiers of the pseudo-labeled cases, which are used for training in all folds.
        existing: splits_final.json of the source; empty if there is none.
    """
    cases = sorted(annotated)
    if not existing and len(cases) >= _FOLDS:
        existing = generate_crossval_split(cases, n_splits=_FOLDS)
    elif not existing:
        existing = [{"train": [other for other in cases if other != case], "val": [case]} for case in cases]
    number = max(_FOLDS, len(existing))
    return [
        {"train": [*split["train"], *sorted(pseudo_labeled)], "val": list(split["val"])}
        for split in islice(cycle(existing), number)
    ]


def write_preprocessed(content: Content, folder: Path) -> None:
    """Write folds and plans into nnUNet_preprocessed/DatasetXXX_Name_PseudoLabels; existing files are not replaced.

    The fingerprint is not copied: it must describe the labeled cases of the new data set.

    Args:
        content: sources of the files.
        folder: nnUNet_raw/DatasetXXX_Name_PseudoLabels, as `write_raw` has written it.
    """
    target = nnunet_folder("nnUNet_preprocessed") / folder.name
    texts = {_SPLITS: (folder / _SPLITS).read_text()}
    if content.plans is not None:
        texts["dataset.json"] = (folder / "dataset.json").read_text()
        file = content.preprocessed / f"{content.plans}.json"
        with explained(ValueError, f"{file} is damaged; plan again"):
            plans = json.loads(file.read_text()) | {"dataset_name": folder.name}
        texts[file.name] = json.dumps(plans, indent=4)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (target / name).exists():
            with replacing(target / name) as partial:
                partial.write_text(text)
