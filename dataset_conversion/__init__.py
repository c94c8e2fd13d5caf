"""Converters to nnU-Net's raw format, one file each; installed as nnunet_dycon.dataset_conversion."""
