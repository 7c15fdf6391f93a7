"""Asking a judge: any server that speaks OpenAI's chat completions, or a checkpoint of one's own in
memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.console import say
from slim.core.errors import SlimError
from slim.data.chat import has_chat_template, render_chat
from slim.evaluation.generation import continue_ids
from slim.loading.load_model import load_model

# answers of a server that may be better in a moment
TEMPORARY = (408, 409, 425, 429, 500, 502, 503, 504)


class Unreachable(SlimError):
    """The judge cannot be asked, now or with these settings."""


@dataclass
class Endpoint:
    """A server.

    Attributes:
        address: up to and with ``/v1``.
        model: name of the model there.
        key_variable: environment variable that holds the key, if one is needed.
        timeout: seconds for one answer.
        retries: further tries after the first.
        wait: seconds before the second try, doubled each time.
    """

    address: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 3
    wait: float = 1.0

    def ask(self, messages: list[dict], new_tokens: int) -> str:
        """Ask for a completion.

        Args:
            messages: of the chat, with ``role`` and ``content``.
            new_tokens: most tokens of the answer.

        Returns:
            The answer's text.

        Raises:
            Unreachable: after the last try, or at once where trying again is useless.
        """
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            text, problem, again = self._try(messages, new_tokens)
            if text is not None:
                return text
            if not again:  # a wrong key or name stays wrong
                raise Unreachable(f"The judge at {self.address} refuses: {problem}.")
        raise Unreachable(
            f"The judge at {self.address} does not answer after {self.retries + 1} tries: "
            f"{problem}."
        )

    def _try(self, messages: list[dict], new_tokens: int) -> tuple[str | None, str, bool]:
        """Ask once; return the text or None, what was wrong, and whether to try again."""
        import requests

        key = os.environ.get(self.key_variable)
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": new_tokens,
        }
        headers = {}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            reply = requests.post(
                f"{self.address.rstrip('/')}/chat/completions",
                json=body,
                headers=headers,
                timeout=self.timeout,
            )
        except requests.RequestException as error:
            return None, type(error).__name__, True
        if reply.status_code != 200:
            reason = " ".join(reply.text.split())[:200]
            problem = f"HTTP {reply.status_code} {reason}".strip()
            return None, problem, reply.status_code in TEMPORARY
        try:
            text = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return None, "what it sends is no chat completion", True
        if not isinstance(text, str):  # null, where a model only calls tools
            return None, "its answer holds no text", True
        return text, "", True


class LocalModel:
    """A checkpoint folder with a chat template, loaded at the first question and kept.

    Attributes:
        folder: the checkpoint.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, folder: str, device: str):
        self.folder = Path(folder).expanduser()
        self.device = device
        self._loaded: tuple | None = None

    def ask(self, messages: list[dict], new_tokens: int) -> str:
        """Answer greedily.

        Args:
            messages: of the chat, with ``role`` and ``content``.
            new_tokens: most tokens of the answer.

        Returns:
            The answer's text.

        Raises:
            Unreachable: when the model has no chat template, or no room for the question.
        """
        model, tokenizer = self._load()
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        # the template writes the special tokens itself
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = model.config.max_position_embeddings - new_tokens
        if len(ids) > room:
            raise Unreachable(
                f"The judge {self.folder.name} has room for {room} tokens, and a question has "
                f"{len(ids)}."
            )
        return continue_ids(model, tokenizer, ids, new_tokens)

    def _load(self) -> tuple:

        if self._loaded is None:
            tokenizer = load_tokenizer(self.folder)
            if not has_chat_template(tokenizer):
                raise Unreachable(
                    f"The judge {self.folder} has no chat template. Give a model tuned for "
                    "conversation."
                )
            for note in open_checkpoint(self.folder).notes:
                say(note, head=f"judge {self.folder.name}")
            self._loaded = load_model(self.folder, "auto", self.device), tokenizer
        return self._loaded
