"""Data: preprocessing of unlabeled cases, their manifest, the two-stream loader and its views."""

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch

__all__ = ["LabeledBatch", "UnlabeledBatch"]
