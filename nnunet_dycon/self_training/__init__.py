"""Self-training: new data sets in which predictions of a trained model are the labels of unlabeled cases."""
