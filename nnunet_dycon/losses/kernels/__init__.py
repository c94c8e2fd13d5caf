"""Fast losses: gradients written by hand and computed in blocks. Tests compare them with the references."""
