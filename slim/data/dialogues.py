"""Conversations from a file or a data set: prompts with answers, dialogues of many turns, questions
about passages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from slim.core.errors import SlimError
from slim.core.settings import require_choice
from slim.data.base import Conversations
from slim.data.corpus import Corpus
from slim.data.encoding import Message

# What data sets call who speaks.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
NO_ANSWER = "No Answer Present."


@dataclass
class Dialogue(Corpus, Conversations):
    """What conversations from files share. long: ``cut`` or ``drop`` what exceeds the window."""

    long: str = "drop"

    column_settings: ClassVar[tuple[str, ...]]  # settings that name columns, for messages

    def __post_init__(self) -> None:
        require_choice("data.long", self.long, ("cut", "drop"))
        super().__post_init__()
        path = self.source(self.split).path
        if path is not None and path.is_file() and path.suffix == ".txt":
            raise SlimError(
                f"{self.text} is plain text without answers. Use data=text for it, or give a .jsonl file."
            )

    def require_columns(self, row: dict, *columns: str | None) -> None:
        """Raise ``SlimError`` naming the first of the columns that a row lacks."""
        for column in filter(None, columns):
            if column not in row:
                names = " and ".join(f"data.{name}=..." for name in self.column_settings)
                raise SlimError(
                    f"{self.title} has no column '{column}' (has: {', '.join(row)}). Set {names} to the right columns."
                )


@dataclass
class Pairs(Dialogue):
    """Prompts and answers.

    prompt, answer: names of the columns; without an answer (None) there are questions only. An
        answer that is a list gives its first element.
    context: a column that is appended to the prompt where it is not empty.
    """

    cache_name: ClassVar[str] = "Pairs"

    prompt: str = "prompt"
    answer: str | None = "answer"
    context: str | None = None

    column_settings: ClassVar[tuple[str, ...]] = ("prompt", "answer")

    def cache_key(self) -> dict:
        found = self.part_identity("answer", "context", "long")
        return {**found, "column": self.prompt}

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        if self.answer is None:
            raise SlimError(
                f"{self.title} has no answers (data.answer=null). Use teacher=on_policy, which makes them, or name the column."
            )
        found = self._all(part)
        if not self.streaming:  # a stream is not read twice
            found = list(found)
            if not any(answer.strip() for _, answer in found):
                raise SlimError(
                    f"{self.title} has no answers: column '{self.answer}' is empty in all {len(found)} rows."
                )
        return self._chosen(found, part)

    def questions(self, part: str) -> Iterator[str]:
        return (prompt for prompt, _ in self._chosen(self._all(part), part))

    def _all(self, part: str) -> Iterator[tuple[str, str]]:
        """Yield all prompts of the part's split with their answers, empty where there are none."""
        return (self.pair(row) for row in self.opened(part).rows())

    def _chosen(self, found, part: str) -> Iterator[tuple[str, str]]:
        """Yield those that belong to the part, in random order."""
        return self.shuffled(pair for pair in found if self.belongs(pair[0], part))

    def pair(self, row: dict) -> tuple[str, str]:
        """Return prompt and answer of a row; the answer is empty where there is none."""
        self.require_columns(row, self.prompt, self.answer, self.context)
        prompt, answer, context = (
            plain(row[column]) if column else ""
            for column in (self.prompt, self.answer, self.context)
        )
        context = context.strip()
        return (f"{prompt}\n\n{context}" if context else prompt), answer


@dataclass
class Messages(Dialogue):
    """Dialogues of many turns; every answer counts in the loss.

    messages: column with the turns, a list of objects (or its JSON). role, content: their keys for
    who speaks and what is said. What stands behind the last answer is left out."""

    cache_name: ClassVar[str] = "Messages"

    messages: str = "messages"
    role: str = "role"
    content: str = "content"

    column_settings: ClassVar[tuple[str, ...]] = ("messages",)

    def cache_key(self) -> dict:
        return self.part_identity("messages", "role", "content", "long")

    def conversations(self, part: str) -> Iterator[list[Message]]:
        return (turns[: last_answer(turns)] for turns in self._chosen(part))

    def questions(self, part: str) -> Iterator[str]:
        """Yield the first question of every dialogue."""
        return (first_question(turns) for turns in self._chosen(part))

    def _chosen(self, part: str) -> Iterator[list[Message]]:
        found = (self.turns(row) for row in self.opened(part).rows())
        return self.shuffled(
            turns for turns in found if turns and self.belongs(first_question(turns), part)
        )

    def turns(self, row: dict) -> list[Message]:
        """Return a row's messages, empty ones left out. Raises ``SlimError`` for a role it does not
        know."""
        self.require_columns(row, self.messages)
        found = row[self.messages]
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except ValueError as error:
                raise SlimError(
                    f"{self.title}: column '{self.messages}' holds text that is no list of turns."
                ) from error
        if isinstance(found, dict):  # as some data sets store a list of objects
            found = [
                dict(zip(found, values, strict=True))
                for values in zip(*found.values(), strict=True)
            ]
        return [
            message for message in map(self._message, found or ()) if message["content"].strip()
        ]

    def _message(self, turn: dict) -> Message:
        if not isinstance(turn, dict) or self.role not in turn or self.content not in turn:
            has = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
            raise SlimError(
                f"{self.title} has a turn without '{self.role}' and '{self.content}' in column '{self.messages}' "
                f"(has: {has}). Set data.role=... and data.content=... to the keys of who speaks and what is said."
            )
        role = ROLES.get(str(turn[self.role]).lower())
        if role is None:
            raise SlimError(
                f"{self.title} has a turn of '{turn[self.role]}'. Roles slim knows: {', '.join(ROLES)}."
            )
        return {"role": role, "content": plain(turn[self.content])}


@dataclass
class Passages(Pairs):
    """Questions about passages, in the schema of MS MARCO (arXiv:1611.09268): the selected passages
    follow the question.

    Rows whose answer is "No Answer Present.", or of whose passages none is selected, count as
    unanswered."""

    cache_name: ClassVar[str] = "Passages"

    prompt: str = "query"
    answer: str | None = "answers"
    context: str | None = "passages"

    def pair(self, row: dict) -> tuple[str, str]:
        self.require_columns(row, self.prompt, self.answer, self.context)
        passages = row[self.context]
        chosen = [
            text
            for text, use in zip(passages["passage_text"], passages["is_selected"], strict=True)
            if use
        ]
        answer = plain(row[self.answer]) if self.answer else ""
        usable = chosen and answer.strip() != NO_ANSWER
        return "\n\n".join([plain(row[self.prompt]), *chosen]), answer if usable else ""


def plain(value: Any) -> str:
    """Return a cell as text: that of the first element of a list, nothing for null."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None else str(value)


def first_question(turns: list[Message]) -> str:
    """Return what the user says first; nothing if only others speak."""
    return next((message["content"] for message in turns if message["role"] == "user"), "")


def last_answer(turns: list[Message]) -> int:
    """Return the place behind the last answer; 0 if there is none."""
    return next(
        (place for place in range(len(turns), 0, -1) if turns[place - 1]["role"] == "assistant"), 0
    )
