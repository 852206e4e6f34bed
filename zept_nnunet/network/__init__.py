"""The network: U-Net features → grouping → anomaly score map → visual prompts → advanced queries → maps."""

from zept_nnunet.network.zept import ZePT, ZePTOutput

__all__ = ["ZePT", "ZePTOutput"]
