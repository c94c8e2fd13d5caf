"""The trainers, one file each: nnunet_dycon.trainers when installed; nnU-Net finds them via nnunet_dycon.discovery."""
