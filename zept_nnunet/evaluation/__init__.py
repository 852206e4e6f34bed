"""What a prediction is worth: figures and pictures from files in nnU-Net's layout."""
