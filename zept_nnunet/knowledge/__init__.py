"""Class name → description → vector."""

from zept_nnunet.knowledge.bank import KnowledgeBank, QuietVector
from zept_nnunet.knowledge.encoders import PlaceholderEncoder, TextEncoder, describe

__all__ = ["KnowledgeBank", "PlaceholderEncoder", "QuietVector", "TextEncoder", "describe"]
