"""The folder for nnU-Net's search (nnUNet_extTrainer); modules here only re-export. Installed as `zept_nnunet.trainers`."""
