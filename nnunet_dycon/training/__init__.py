"""Components that all semi-supervised trainers share, such as checkpoints, preflight checks, training step and plots.

`nnunet_dycon.trainers.semi_supervised` calls them in the methods (hooks) of nnU-Net's trainer.
"""
