"""Converters of datasets to nnU-Net's raw format, one module for each converter, and their common modules.

The folder is installed as nnunet_dycon.dataset_conversion.
"""
