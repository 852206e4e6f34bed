"""The folder that nnU-Net searches (nnUNet_extTrainer): modules here only re-export."""
