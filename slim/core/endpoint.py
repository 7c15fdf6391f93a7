"""Asking any server that speaks OpenAI's chat completions, with retries and a limit of what it may
cost."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from typing import Any

from slim.core.errors import SlimError

# answers of a server that may be better in a moment
TEMPORARY = (408, 409, 425, 429, 500, 502, 503, 504)
# for servers that do not say what they counted
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_PICTURE = 1000


class Unreachable(SlimError):
    """A model cannot be asked, now or with these settings."""


class TooLong(Unreachable):
    """A question has no room in the model's context; others may have."""


class TooCostly(SlimError):
    """The limit of what may be asked is reached."""


def require_address(setting: str, address: Any) -> None:
    """Require an address of a server, or None.

    Args:
        setting: as the user types it, such as ``eval.judge.endpoint``.
        address: its value.

    Raises:
        SlimError: when it is something else.
    """
    if address is not None and not re.match(r"https?://[^/\s]+", str(address)):
        raise SlimError(
            f"{setting}={address} is no address. It looks like http://127.0.0.1:8000/v1."
        )


@dataclass
class Budget:
    """What may be asked of servers, and what was asked so far.

    Attributes:
        tokens: most tokens of questions and answers together; None: no limit.
        spent: tokens so far, as the servers count them or else by an estimate.
        requests: that were answered.
    """

    tokens: int | None = None
    spent: int = field(default=0, init=False)
    requests: int = field(default=0, init=False)

    def require(self) -> None:
        """Raise ``TooCostly`` where the limit is reached."""
        if self.tokens is not None and self.spent >= self.tokens:
            raise TooCostly(
                f"The limit of {self.tokens:,} tokens is reached after {self.requests} answers."
            )

    def pay(self, tokens: int) -> None:
        """Count one answer.

        Args:
            tokens: of the question and the answer.
        """
        self.spent += tokens
        self.requests += 1


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
        role: what the model is asked as, for messages.
        budget: what may be asked; shared by endpoints that are paid for together.
    """

    address: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 3
    wait: float = 1.0
    role: str = "judge"
    budget: Budget = field(default_factory=Budget)

    def ask(self, messages: list[dict], new_tokens: int) -> str:
        """Ask for a completion.

        Args:
            messages: of the chat, with ``role`` and ``content``.
            new_tokens: most tokens of the answer.

        Returns:
            The answer's text.

        Raises:
            Unreachable: after the last try, or at once where trying again is useless.
            TooCostly: when the budget is used up.
        """
        self.budget.require()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            text, problem, again = self._try(messages, new_tokens)
            if text is not None:
                return text
            if not again:  # a wrong key or name stays wrong
                raise Unreachable(f"The {self.role} at {self.address} refuses: {problem}.")
        raise Unreachable(
            f"The {self.role} at {self.address} does not answer after {self.retries + 1} tries: "
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
            content = reply.json()
            text = content["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return None, "what it sends is no chat completion", True
        self.budget.pay(_tokens(content, messages, text))
        if not isinstance(text, str):  # null, where a model only calls tools
            return None, "its answer holds no text", True
        return text, "", True


def _tokens(content: dict, messages: list[dict], text: Any) -> int:
    """Return the tokens of question and answer: what the server says, or an estimate."""
    usage = content.get("usage")
    if isinstance(usage, dict) and isinstance(usage.get("total_tokens"), int):
        return usage["total_tokens"]
    characters = len(str(text))
    pictures = 0
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            characters += len(parts)
            continue
        for part in parts:
            if part["type"] == "text":
                characters += len(part["text"])
            else:
                pictures += 1
    return characters // CHARACTERS_PER_TOKEN + pictures * TOKENS_PER_PICTURE
