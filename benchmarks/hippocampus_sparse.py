"""Comparison of trainers on hippocampus MRI of which only every 8th slice is annotated, see `benchmarks.hippocampus`.

    python -m benchmarks.hippocampus_sparse --annotation sparse --data <Task04_Hippocampus> --work <folder>
        --methods lower_bound nnUNetTrainerWeakToStrong --seeds 0 1 2

The data set and the CSV depend on --annotation:

- sparse (hippocampus_sparse.csv): every 8th slice of the labeled cases is annotated, and there are unlabeled cases.
  lower_bound is nnU-Net's own trainer with the ignore label.
- sparse_alone (hippocampus_sparse_alone.csv): the same labeled cases without unlabeled cases.
- complete (hippocampus_complete.csv): the same labeled cases with all slices annotated, and the unlabeled cases. The
  method lower_bound on these data is the upper bound for sparse and sparse_alone.

The slices are 1 mm thick. The images are not resampled across the slices: nnU-Net's resampling of labels to 2 mm would
remove annotated slices.
"""

import argparse
import shutil
from copy import copy
from dataclasses import dataclass, replace

from benchmarks.comparison import compare
from benchmarks.hippocampus import HIPPOCAMPUS, Hippocampus
from benchmarks.preparation import UNLABELED, UPPER_BOUND, LabeledSet, Preparation
from nnunet_dycon.dataset_conversion.writer import FOLDERS

_EVERY = "8"


@dataclass(frozen=True)
class SparseHippocampus(Hippocampus):
    """Hippocampus data set in which every 8th slice of the labeled cases is annotated.

    Attributes:
        has_unlabeled: whether the data set has unlabeled cases.
    """

    has_unlabeled: bool = True

    def write(self, preparation: Preparation, labeled: LabeledSet) -> None:
        complete = copy(preparation)
        complete.data_set = ANNOTATIONS["complete"]
        if not complete.raw(labeled).is_dir():
            complete.data_set.write(complete, labeled)
        source, target = str(complete.dataset_id(labeled)), str(preparation.dataset_id(labeled))
        preparation.command("nnunet_dycon.cli:main", "sparsify", "-d", source, "-o", target, "--every", _EVERY)
        if not self.has_unlabeled:
            shutil.rmtree(preparation.raw(labeled) / FOLDERS["unlabeled"][0])


_COMPLETE = replace(
    HIPPOCAMPUS, table="hippocampus_complete", protocol="hippocampus", first_id=500, slice_spacing=1.0, iterations=1000
)
_SPARSE = SparseHippocampus(
    **vars(_COMPLETE) | {"name": f"Hippocampus_Every{_EVERY}", "table": "hippocampus_sparse", "first_id": 600}
)
ANNOTATIONS: dict[str, Hippocampus] = {
    "complete": _COMPLETE,
    "sparse": _SPARSE,
    "sparse_alone": replace(_SPARSE, table="hippocampus_sparse_alone", first_id=700, has_unlabeled=False),
}

if __name__ == "__main__":
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--annotation", choices=ANNOTATIONS, required=True)
    chosen, others = chooser.parse_known_args()
    if chosen.annotation != "complete" and {UNLABELED, UPPER_BOUND} & set(others):
        chooser.error(f"{UNLABELED} and {UPPER_BOUND} need completely annotated labels; use --annotation complete")
    compare(ANNOTATIONS[chosen.annotation], __doc__, others)
