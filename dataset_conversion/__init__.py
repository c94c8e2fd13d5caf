"""Converters into nnU-Net's raw format, one file each. Installed as nnunet_dycon.dataset_conversion."""
