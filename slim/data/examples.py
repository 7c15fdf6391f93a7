"""What a model is trained on: the choices of the ``data`` group, and the bases from which others
can be made."""

from slim.data.base import (
    PARTS,
    TEST,
    TRAIN,
    VALIDATION,
    Conversations,
    PlainText,
    TrainingData,
    is_validation,
)
from slim.data.corpus import TextData, passages
from slim.data.dialogues import Messages, Pairs, Passages
from slim.data.tiny import TinyChat, TinyText

__all__ = [
    "PARTS",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Conversations",
    "Messages",
    "Pairs",
    "Passages",
    "PlainText",
    "TextData",
    "TinyChat",
    "TinyText",
    "TrainingData",
    "is_validation",
    "passages",
]
