"""What a prediction is worth: figures, curves and pages from files in nnU-Net's layout."""
