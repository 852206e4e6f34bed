"""The folder that nnU-Net searches (nnUNet_extTrainer): modules here only re-export. The package `zept_nnunet.trainers`."""
