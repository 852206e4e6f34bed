"""Class name → description → vector."""

from zept_nnunet.knowledge.bank import KnowledgeBank, QuietVector
from zept_nnunet.knowledge.source import KnowledgeSource, built_in
from zept_nnunet.knowledge.texts import Description, describe_all, describe_organ, describe_tumor

__all__ = [
    "Description",
    "KnowledgeBank",
    "KnowledgeSource",
    "QuietVector",
    "built_in",
    "describe_all",
    "describe_organ",
    "describe_tumor",
]
