"""Components that all semi-supervised trainers share, such as checkpoints, preflight checks, training step and plots.

`nnunet_dycon.trainers.semi_supervised` calls them in nnU-Net's hooks.
"""
