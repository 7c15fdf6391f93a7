"""Answers in the form of OpenAI's interface: whole, or as events while they come."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field

from slim.serve.asked import Asked
from slim.serve.model import Answer, ChatModel

DONE = "data: [DONE]\n\n"


def event(content: dict) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def comment(text: str) -> str:
    """Return a line that clients leave out, and that keeps the connection alive."""
    return f": {text}\n\n"


@dataclass
class Reply:
    """What one request is answered.

    Attributes:
        asked: the request.
        answers: one for each prompt, filled in while it comes.
        waited: seconds until it was its turn.
        name: of the reply, drawn anew.
        created: seconds since 1970.
    """

    asked: Asked
    answers: list[Answer] = field(default_factory=list)
    waited: float = 0.0
    name: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        start = "cmpl"
        if self.asked.chat:
            start = "chatcmpl"
        self.name = f"{start}-{uuid.uuid4().hex}"

    def _frame(self, kind: str, choices: list[dict]) -> dict:
        if not self.asked.chat:
            kind = "text_completion"  # whole or in parts
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.asked.model.name,
            "choices": choices,
        }

    def usage(self) -> dict:
        """Return how many tokens were read and written."""
        read = sum(answer.prompt_tokens for answer in self.answers)
        written = sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def whole(self, texts: list[str]) -> dict:
        """Return the reply to a request that does not stream.

        Args:
            texts: one for each prompt.
        """
        choices = []
        for place, text in enumerate(texts):
            choice = {"index": place, "finish_reason": self.answers[place].finish_reason}
            if self.asked.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice | {"logprobs": None})
        frame = self._frame("chat.completion", choices) | {"usage": self.usage()}
        return frame | {"slim": self._took(self.answers[-1])}

    def part(self, place: int, text: str = "", begin: bool = False, end: bool = False) -> str:
        """Return an event with some text.

        Args:
            place: of the prompt.
            text: that is new.
            begin: whether it is the first of its prompt.
            end: whether it is the last.
        """
        choice = {"index": place, "finish_reason": None, "logprobs": None}
        if not self.asked.chat:
            choice["text"] = text
        elif begin:
            choice["delta"] = {"role": "assistant", "content": text}
        elif end:
            choice["delta"] = {}
        else:
            choice["delta"] = {"content": text}
        frame = self._frame("chat.completion.chunk", [choice])
        if end:
            answer = self.answers[place]
            choice["finish_reason"] = answer.finish_reason
            frame["slim"] = self._took(answer)
        return event(frame)

    def last_part(self) -> str:
        """Return the event with the number of tokens, for those who ask for it."""
        return event(self._frame("chat.completion.chunk", []) | {"usage": self.usage()})

    def _took(self, answer: Answer) -> dict:
        """Return what an answer took: seconds, tokens per second, bytes; slim's own addition to
        OpenAI's interface."""
        return {
            "waited_seconds": round(self.waited, 4),
            "reading_seconds": round(answer.reading, 4),
            "writing_seconds": round(answer.writing, 4),
            "reading_tokens_per_second": round(answer.reading_rate, 2),
            "writing_tokens_per_second": round(answer.writing_rate, 2),
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.tokens,
            "left_out": self.asked.left_out,
            "weights_bytes": self.asked.model.weights,
            "cache_bytes": answer.cache_bytes,
        }


def model_entry(model: ChatModel, created: int) -> dict:
    """Return a model as ``/v1/models`` lists it.

    Args:
        model: the model.
        created: when it was loaded, seconds since 1970.
    """
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "slim",
        "slim": {
            "chain": model.chain,
            "context": model.context,
            "dtype": model.dtype,
            "weights_bytes": model.weights,
            "chat_template": model.chats,
            "system_prompt": model.chats and model.takes_system,
        },
    }
