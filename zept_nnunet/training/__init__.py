"""nnU-Net's trainer with ZePT's network, losses and stages in its hooks."""
