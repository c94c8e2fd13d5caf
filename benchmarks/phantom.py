"""Comparison of trainers on phantoms: synthetic images with small lesions of less than 1 % of the voxels.

    python -m benchmarks.phantom --work <folder> --methods lower_bound nnUNetTrainerDyCON --seeds 0 1 2

58 cases are for training, 60 each for val and test. Many held-out cases and many short runs keep the noise small.
Improvements on phantoms must be confirmed on scans. `benchmarks.comparison` describes the methods, the sets of cases to
score, and the CSV with the scores.
"""

from benchmarks.comparison import compare
from benchmarks.preparation import DataSet, LabeledSet, Preparation
from nnunet_dycon.demo.phantom import write_dataset

SEED = 7  # seed of the images
SHAPE = (24, 32, 40)
LESION_RADII = (1.5, 3.5)  # voxels
HELD_OUT = {"val": 60, "test": 60}


class Phantoms(DataSet):
    """Synthetic images with small lesions. The images do not depend on the number of labeled cases."""

    def write(self, preparation: Preparation, labeled: LabeledSet) -> None:
        counts = {"labeled": labeled.labels, "unlabeled": self.training_cases - labeled.labels, **HELD_OUT}
        write_dataset(preparation.raw(labeled), SEED, counts, shape=SHAPE, lesion_radii=LESION_RADII)


PHANTOMS = Phantoms(
    "Phantom", "phantom", first_id=200, labels=(4, 8), training_cases=58, spacing=1.0, features=(16, 32, 64),
    iterations=1000, needs_data=False,
)  # fmt: skip

if __name__ == "__main__":
    compare(PHANTOMS, __doc__)
