"""Comparison of trainers on 200 hippocampus MRI of the Medical Segmentation Decathlon, with two adjacent labels.

    python -m benchmarks.hippocampus --data <Task04_Hippocampus> --work <folder> --methods lower_bound --seeds 0 1 2

benchmarks/protocols/hippocampus.json lists the cases: 130 for training, 30 for val, 40 for test. With `--draw K`,
K > 0, the labeled cases are drawn from the 130 with seed K. `benchmarks.comparison` describes the methods, the sets of
cases to score, and the CSV with the scores.
"""

from benchmarks.comparison import compare
from benchmarks.preparation import DataSet, LabeledSet, Preparation


class Hippocampus(DataSet):
    """Hippocampus data set: 200 of the 260 public training volumes of Task04 of the Medical Segmentation Decathlon."""

    def write(self, preparation: Preparation, labeled: LabeledSet) -> None:
        preparation.convert("msd", labeled)


HIPPOCAMPUS = Hippocampus(
    "Hippocampus", "hippocampus", first_id=300, labels=(4, 8, 16), training_cases=130, spacing=2.0,
    features=(16, 32, 64), iterations=2000, draws=True,
)  # fmt: skip

if __name__ == "__main__":
    compare(HIPPOCAMPUS, __doc__)
