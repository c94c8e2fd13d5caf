"""Annotation rounds: selecting the next cases to annotate, and adding their labels to the data set."""
