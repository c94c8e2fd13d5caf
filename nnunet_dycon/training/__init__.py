"""Parts of a training that all semi-supervised trainers use. Each can be used without a trainer.

`nnunet_dycon.trainers.semi_supervised` connects them to nnU-Net's hooks.
"""
