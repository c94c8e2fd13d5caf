"""Start from pretrained weights: `nnunet_dycon adapt_weights`."""
