"""The trainers, one file each. Installed as nnunet_dycon.trainers; nnU-Net finds them through nnunet_dycon.discovery."""
