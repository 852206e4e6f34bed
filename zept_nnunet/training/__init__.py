"""nnU-Net's trainer with ZePT's network, losses and stages in its hooks."""

from zept_nnunet import check_nnunet_version

check_nnunet_version()  # nnU-Net imports this package as an external trainer: say here what an older one would lack
