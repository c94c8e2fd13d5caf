"""Self-training: new data sets in which predictions of a trained model are labels of the unlabeled cases."""
