"""A judge in memory: a checkpoint of one's own. Servers are asked through
:mod:`slim.core.endpoint`."""

from __future__ import annotations

from pathlib import Path

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.console import say
from slim.core.endpoint import TooLong, Unreachable
from slim.data.chat import has_chat_template, render_chat
from slim.evaluation.generation import continue_ids
from slim.loading.load_model import load_model


class LocalModel:
    """A checkpoint folder with a chat template, loaded at the first question and kept.

    Attributes:
        folder: the checkpoint.
        device: ``"cpu"`` or ``"cuda"``.
        role: what the model is asked as, for messages.
    """

    def __init__(self, folder: str, device: str, role: str = "judge"):
        self.folder = Path(folder).expanduser()
        self.device = device
        self.role = role
        self._loaded: tuple | None = None

    def ask(self, messages: list[dict], new_tokens: int) -> str:
        """Answer greedily.

        Args:
            messages: of the chat, with ``role`` and ``content``.
            new_tokens: most tokens of the answer.

        Returns:
            The answer's text.

        Raises:
            Unreachable: when the model has no chat template.
            TooLong: when it has no room for the question.
        """
        model, tokenizer = self._load()
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        # the template writes the special tokens itself
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = model.config.max_position_embeddings - new_tokens
        if len(ids) > room:
            raise TooLong(
                f"The {self.role} {self.folder.name} has room for {room} tokens, and a question "
                f"has {len(ids)}."
            )
        return continue_ids(model, tokenizer, ids, new_tokens)

    def _load(self) -> tuple:
        if self._loaded is None:
            tokenizer = load_tokenizer(self.folder)
            if not has_chat_template(tokenizer):
                raise Unreachable(
                    f"The {self.role} {self.folder} has no chat template. Give a model tuned for "
                    "conversation."
                )
            for note in open_checkpoint(self.folder).notes:
                say(note, head=f"{self.role} {self.folder.name}")
            self._loaded = load_model(self.folder, "auto", self.device), tokenizer
        return self._loaded
