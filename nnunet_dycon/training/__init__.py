"""The parts of a training that all semi-supervised trainers share; each can be used without a trainer.

`nnunet_dycon.trainers.semi_supervised` connects them to nnU-Net's hooks.
"""
