"""Class name → description → vector."""

from zept_nnunet.knowledge.bank import KnowledgeBank, QuietVector
from zept_nnunet.knowledge.source import KnowledgeSource, built_in
from zept_nnunet.knowledge.texts import Description, describe, describe_all

__all__ = ["Description", "KnowledgeBank", "KnowledgeSource", "QuietVector", "built_in", "describe", "describe_all"]
