"""The folder that the demo puts on nnUNet_extTrainer."""
