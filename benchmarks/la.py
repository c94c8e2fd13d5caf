"""Comparison of trainers on left-atrium MRI of the 2018 Atrial Segmentation Challenge.

    python -m benchmarks.la --data <la_125mm> --work <folder> --methods lower_bound nnUNetTrainerDyCON --seeds 0 1 2

benchmarks/protocols/la.json lists the cases: 55 for training, 8 for val, 16 for test. The volumes are cropped around
the reference segmentation. The scores can therefore be compared between methods, but not with scores on other data.
`benchmarks.comparison` describes the methods, the sets of cases to score, and the CSV with the scores.
"""

from benchmarks.comparison import compare
from benchmarks.preparation import DataSet, LabeledSet, Preparation


class LeftAtrium(DataSet):
    """Left-atrium data set: 79 of the 100 LGE-MRI of the 2018 Atrial Segmentation Challenge."""

    def write(self, preparation: Preparation, labeled: LabeledSet) -> None:
        preparation.convert("la", labeled, "--spacing", "1.25")


LEFT_ATRIUM = LeftAtrium(
    "LA2018", "la", first_id=100, labels=(4, 8), training_cases=55, spacing=2.5, features=(16, 32, 64, 128),
    iterations=2000,
)  # fmt: skip

if __name__ == "__main__":
    compare(LEFT_ATRIUM, __doc__)
