"""Data: checks of cases, preprocessing of unlabeled cases, and loaders of labeled and unlabeled patches."""

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch

__all__ = ["LabeledBatch", "UnlabeledBatch"]
