"""A conversation with one model: its history, what of it fits the context, its next answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from slim.core.errors import SlimError
from slim.data.chat import Message
from slim.serve.model import Answer, ChatModel
from slim.serve.sampling import Sampling


class Session:
    """A conversation that grows by a question and an answer at a time.

    Attributes:
        model: who answers.
        sampling: settings of its answers.
        system: what the system says first; None: nothing.
        turns: questions and answers so far, as messages.
        left_out: how many of the oldest messages the last prompt had no room for.
    """

    def __init__(self, model: ChatModel, sampling: Sampling, system: str | None = None):
        self.model = model
        self.sampling = sampling
        self.system = system
        self.turns: list[Message] = []
        self.left_out = 0

    def ask(
        self, question: str, answer: Answer, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yield the answer to a question, piece by piece; both join the history when it ends.

        Args:
            question: what the user says.
            answer: is filled in.
            cancelled: true ends the answer early.

        Raises:
            SlimError: the question alone is too long; the history stays as it was.
        """
        ids = self.prompt(question)
        answer.prompt_tokens = len(ids)
        pieces = []
        try:
            for piece in self.model.answer(ids, self.sampling, answer, cancelled):
                if not pieces:
                    piece = piece.lstrip()  # templates put a space before an answer themselves
                if piece:
                    pieces.append(piece)
                    yield piece
        finally:
            if pieces:  # also what was broken off: the user has read it
                self.turns.append({"role": "user", "content": question})
                self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def prompt(self, question: str) -> list[int]:
        """Return the tokens to continue: as much of the history as fits, and the question.

        Raises:
            TooLong: the question alone does not fit.
        """
        if not self.model.chats:
            ids = self.model.text_ids(question)
            self.model.room(ids, self.sampling)
            return ids
        messages = [*self.turns, {"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        ids, self.left_out = self.model.fitted(messages, self.sampling)
        return ids

    def undo(self) -> str | None:
        """Forget the last question with its answer; returns the question, None if there is none."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def say_first(self, system: str | None) -> None:
        """Change what the system says.

        Raises:
            SlimError: the model's template does not take it.
        """
        if system:
            hello = {"role": "user", "content": "Hello"}
            if not self.model.chats:
                raise SlimError(f"{self.model.name} has no chat template, so no system prompt.")
            self.model.chat_ids([{"role": "system", "content": system}, hello])
        self.system = system or None
