"""Conversations from a file or a data set: prompts with answers, dialogues of many turns, questions
about passages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from slim.core.errors import SlimError
from slim.core.settings import require_choice
from slim.data.base import Conversations
from slim.data.cells import as_records, as_text, first_text
from slim.data.chat import Conversation, Message
from slim.data.corpus import Corpus

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
CALLS = ("tool_calls", "function_call")  # of OpenAI's turns
NO_ANSWER = "No Answer Present."


@dataclass
class Dialogue(Corpus, Conversations):
    """What conversations from files share.

    Attributes:
        long: ``cut`` or ``drop`` what exceeds the window.
    """

    long: str = "drop"

    column_settings: ClassVar[tuple[str, ...]]  # settings that name columns, for messages

    def __post_init__(self) -> None:
        require_choice("data.long", self.long, ("cut", "drop"))
        super().__post_init__()
        path = self.source(self.split).path
        if path is not None and path.is_file() and path.suffix == ".txt":
            raise SlimError(
                f"{self.text} is plain text without answers. "
                "Use data=text for it, or give a .jsonl file."
            )

    def require_columns(self, row: dict, *columns: str | None) -> None:
        """Require the named columns in a row; None stands for a column that is not used.

        Raises:
            SlimError: naming the first column that is missing, and those there are.
        """
        for column in columns:
            if column and column not in row:
                names = " and ".join(f"data.{name}=..." for name in self.column_settings)
                raise SlimError(
                    f"{self.title} has no column '{column}' (has: {', '.join(row)}). "
                    f"Set {names} to the right columns."
                )


@dataclass
class Pairs(Dialogue):
    """Prompts and answers.

    Attributes:
        prompt: column of the prompt.
        answer: column of the answer, of which the first counts if it is a list; None: there are
            questions only.
        context: column that is appended to the prompt where it is not empty; None: there is none.
    """

    cache_name: ClassVar[str] = "Pairs"

    prompt: str = "prompt"
    answer: str | None = "answer"
    context: str | None = None

    column_settings: ClassVar[tuple[str, ...]] = ("prompt", "answer")

    def cache_key(self) -> dict:
        settings = self.part_identity("answer", "context", "long")
        return {**settings, "column": self.prompt}

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        if self.answer is None:
            raise SlimError(
                f"{self.title} has no answers (data.answer=null). Use teacher=on_policy, which "
                "makes them, or name the column."
            )
        pairs: Iterable[tuple[str, str]] = self._all_pairs(part)
        if not self.streaming:  # a stream is not read twice
            pairs = list(pairs)
            if not any(answer.strip() for _, answer in pairs):
                raise SlimError(
                    f"{self.title} has no answers: column '{self.answer}' is empty in all "
                    f"{len(pairs)} rows."
                )
        return self._chosen(pairs, part)

    def questions(self, part: str) -> Iterator[str]:
        return (prompt for prompt, _ in self._chosen(self._all_pairs(part), part))

    def _all_pairs(self, part: str) -> Iterator[tuple[str, str]]:
        """Yield all prompts of the part's split with their answers, empty where there are none."""
        for where, row in self.opened(part).located_rows():
            yield self.pair(row, where)

    def _chosen(self, pairs: Iterable[tuple[str, str]], part: str) -> Iterator[tuple[str, str]]:
        """Yield those that belong to the part, in random order."""
        return self.shuffled(pair for pair in pairs if self.belongs(pair[0], part))

    def pair(self, row: dict, where: str) -> tuple[str, str]:
        """Return prompt and answer of a row; the answer is empty where there is none.

        Args:
            row: of the file or data set.
            where: it stands, for messages.
        """
        self.require_columns(row, self.prompt, self.answer, self.context)
        prompt = self._cell(row, self.prompt, where)
        context = self._cell(row, self.context, where).strip()
        if context:
            prompt = f"{prompt}\n\n{context}"
        return prompt, self._cell(row, self.answer, where)

    def check_row(self, row: dict, where: str) -> None:
        self.pair(row, where)

    def _cell(self, row: dict, column: str | None, where: str) -> str:
        """Return a cell as text; nothing where there is no such column."""
        return first_text(row[column], f"{where}: column '{column}'") if column else ""


@dataclass
class Messages(Dialogue):
    """Dialogues of many turns; every answer counts in the loss.

    What stands after the last answer is left out.

    Attributes:
        messages: column with the turns, a list of objects (or its JSON).
        role: key of who speaks.
        content: key of what is said: text, or a list of parts that are text.
    """

    cache_name: ClassVar[str] = "Messages"

    messages: str = "messages"
    role: str = "role"
    content: str = "content"

    column_settings: ClassVar[tuple[str, ...]] = ("messages",)

    def cache_key(self) -> dict:
        return self.part_identity("messages", "role", "content", "long")

    def conversations(self, part: str) -> Iterator[list[Message]]:
        for turns in self._chosen(part):
            end = last_answer(turns)
            if end == 1:  # an answer to nothing
                end = 0
            yield Conversation(turns[:end], turns.where)

    def questions(self, part: str) -> Iterator[str]:
        """Yield the first question of every dialogue."""
        return (first_question(turns) for turns in self._chosen(part))

    def _chosen(self, part: str) -> Iterator[Conversation]:
        """Yield the dialogues that belong to the part, in random order."""
        return self.shuffled(
            turns
            for turns in self._all_turns(part)
            if turns and self.belongs(first_question(turns), part)
        )

    def _all_turns(self, part: str) -> Iterator[Conversation]:
        """Yield all dialogues of the part's split."""
        for where, row in self.opened(part).located_rows():
            yield Conversation(self.turns(row, where), where)

    def check_row(self, row: dict, where: str) -> None:
        self.turns(row, where)

    def turns(self, row: dict, where: str) -> list[Message]:
        """Return a row's messages, empty ones left out.

        Args:
            row: of the file or data set.
            where: it stands, for messages.

        Raises:
            SlimError: for turns that are none, and for a role that slim does not know.
        """
        self.require_columns(row, self.messages)
        where = f"{where}: column '{self.messages}'"
        messages = []
        for turn in as_records(row[self.messages], where):
            message = self._message(turn, where)
            if message["content"].strip():
                messages.append(message)
        return messages

    def _message(self, turn: Any, where: str) -> Message:
        """Return a turn as a message."""
        if not isinstance(turn, dict) or self.role not in turn or self.content not in turn:
            has = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
            raise SlimError(
                f"{where} has a turn without '{self.role}' and '{self.content}' (has: {has}). "
                "Set data.role=... and data.content=... to the keys of who speaks and what is said."
            )
        for key in CALLS:
            if turn.get(key):
                raise SlimError(
                    f"{where} has a turn with '{key}', which is no text. Leave such rows out: slim "
                    "learns what is said, not calls of tools."
                )
        role = ROLES.get(str(turn[self.role]).lower())
        if role is None:
            raise SlimError(
                f"{where} has a turn of '{turn[self.role]}'. Roles slim knows: {', '.join(ROLES)}."
            )
        return {"role": role, "content": as_text(turn[self.content], where)}


@dataclass
class Passages(Pairs):
    """Questions about passages, in the schema of MS MARCO (arXiv:1611.09268): the selected passages
    follow the question.

    Rows whose answer is "No Answer Present.", or of whose passages none is selected, count as
    unanswered.

    Attributes:
        prompt: column of the question.
        answer: column of the answers, of which the first counts; None: there are questions only.
        context: column of the passages, each with ``passage_text`` and ``is_selected``.
    """

    cache_name: ClassVar[str] = "Passages"

    prompt: str = "query"
    answer: str | None = "answers"
    context: str | None = "passages"

    def pair(self, row: dict, where: str) -> tuple[str, str]:
        self.require_columns(row, self.prompt, self.answer, self.context)
        selected = self._selected(row, where)
        question = "\n\n".join([self._cell(row, self.prompt, where), *selected])
        answer = self._cell(row, self.answer, where)
        if not selected or answer.strip() == NO_ANSWER:
            answer = ""
        return question, answer

    def _selected(self, row: dict, where: str) -> list[str]:
        """Return the texts of a row's selected passages."""
        where = f"{where}: column '{self.context}'"
        selected = []
        for passage in as_records(row[self.context], where):
            if not isinstance(passage, dict) or not {"passage_text", "is_selected"} <= set(passage):
                raise SlimError(f"{where} has a passage without passage_text and is_selected.")
            if passage["is_selected"]:
                selected.append(as_text(passage["passage_text"], where))
        return selected


def first_question(turns: list[Message]) -> str:
    """Return what the user says first; nothing if only others speak."""
    for message in turns:
        if message["role"] == "user":
            return message["content"]
    return ""


def last_answer(turns: list[Message]) -> int:
    """Return how many turns there are up to the last answer; 0 if there is none."""
    for place in range(len(turns), 0, -1):
        if turns[place - 1]["role"] == "assistant":
            return place
    return 0
