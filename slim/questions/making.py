"""Questions about pages: a model writes them, and each has to be answerable from its page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from slim.checkpoints.checkpoint import checksums
from slim.checkpoints.store import digest
from slim.core.console import track
from slim.core.endpoint import Budget, Endpoint, TooCostly, TooLong, Unreachable, require_address
from slim.core.errors import SlimError
from slim.core.replies import Replies
from slim.core.settings import require_choice, require_number
from slim.evaluation.chat import LocalModel
from slim.questions.pairs import Pair, agree, is_on_page, problem_of, read_pairs

WRITE = (
    "Write {count} questions about the user's text, in the language of the text. Each must be "
    "answerable from the text alone and understandable without it: name what it is about, and "
    "never mention the text, the page or the author. Answer in one or two sentences. Write one "
    'JSON object a line and nothing else: {{"question": "...", "answer": "..."}}'
)
ANSWER = (
    "Answer the question from the text alone, in one or two sentences. If the text does not say, "
    "write exactly: {unknown}\n\nText:\n{page}"
)
UNKNOWN = "NOT IN THE TEXT"
CHECKS = ("model", "words", "none")
TOKENS_A_PAIR = 120
ANSWER_TOKENS = 120
HOPELESS = 5  # pages in a row without a question, after which a model is given up


class Client(Protocol):
    """What answers."""

    def ask(self, messages: list[dict], new_tokens: int) -> str:
        """Return the answer to a chat."""


@dataclass
class QuestionSettings:
    """Who writes questions, and which are kept.

    Attributes:
        model: name of the model at ``endpoint``, or a checkpoint folder with a chat template where
            there is no endpoint.
        endpoint: server such as ``http://127.0.0.1:8000/v1``; None: ``model`` is a folder.
        per_page: questions asked for about each page, 1 to 50.
        check: ``"model"`` has the model answer each question from the page, and keeps those whose
            two answers agree and stand on the page; ``"words"`` only looks for the answer's words
            on the page; ``"none"`` keeps all.
        limit: most pages, from the start; None: all.
        max_tokens: most tokens of all questions and answers of a run; None: no limit.
        key_variable: environment variable with the server's key.
        timeout: seconds waited for one answer.
        retries: further tries after the first.
        wait: seconds before the second try, doubled each time.
        device: ``"cpu"`` or ``"cuda"``, for a folder.
    """

    model: str
    endpoint: str | None = None
    per_page: int = 3
    check: str = "model"
    limit: int | None = None
    max_tokens: int | None = 1_000_000
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 3
    wait: float = 1.0
    device: str = "cpu"

    version: ClassVar[int] = 1  # of the instructions above

    def __post_init__(self) -> None:
        require_address("--endpoint", self.endpoint)
        require_choice("--check", self.check, CHECKS)
        require_number("--per-page", self.per_page, 1, 50, integer=True)
        require_number("--retries", self.retries, 0, integer=True)
        for name in ("limit", "max_tokens"):
            if getattr(self, name) is not None:
                require_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, integer=True)
        for name in ("timeout", "wait"):
            require_number(f"--{name}", getattr(self, name), 0)
        if self.endpoint is None and not Path(self.model).expanduser().is_dir():
            raise SlimError(
                f"--model {self.model} is no checkpoint folder. Give one, or the server that has "
                "the model: --endpoint http://HOST:PORT/v1"
            )

    def client(self, budget: Budget) -> Client:
        """Return what answers: the server, or the folder's model."""
        role = "model that writes questions"
        if self.endpoint is None:
            return LocalModel(self.model, self.device, role)
        return Endpoint(
            self.endpoint, self.model, self.key_variable, self.timeout, self.retries, self.wait,
            role, budget,
        )  # fmt: skip

    def identity(self) -> list:
        """Return what determines an answer besides the question: a folder by what it holds."""
        if self.endpoint is None:
            return [self.version, checksums(Path(self.model).expanduser())]
        return [self.version, self.model]


@dataclass
class QuestionMaker:
    """Makes questions, page by page.

    Attributes:
        settings: who writes them, and which are kept.
        cache: folder for answers, so that none is asked for twice.
        made: pairs that are kept.
        dropped: reason -> pairs or pages.
        budget: what was asked.
    """

    settings: QuestionSettings
    cache: Path
    made: int = field(default=0, init=False)
    dropped: Counter = field(default_factory=Counter, init=False)
    budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        self.budget = Budget(self.settings.max_tokens)
        self._client = self.settings.client(self.budget)
        self._identity = self.settings.identity()
        self._replies = Replies(self.cache / "answers.jsonl", "answers")
        self._known: set[str] = set()

    def questions(self, pages: Iterable[dict]) -> Iterator[dict]:
        """Yield questions with answers.

        Args:
            pages: records with ``text``, and ``source``, ``page``, ``split`` where they have them,
                as :mod:`slim.documents` writes them.

        Yields:
            ``question``, ``answer`` and, where the page has them, ``source``, ``page``,
            ``split``.

        Raises:
            SlimError: when the model cannot be asked, costs too much, or writes nothing usable.
        """
        rows = list(pages)[: self.settings.limit]
        empty = 0
        for row in track(rows, "questions"):
            kept = self._about(row["text"])
            empty = 0 if kept else empty + 1
            if empty >= HOPELESS:
                raise SlimError(
                    f"{self.settings.model} wrote no usable question about {empty} pages in a row "
                    f"({_most(self.dropped)}). Use another --model, or a weaker --check."
                )
            for pair in kept:
                self.made += 1
                made = {"question": pair.question, "answer": pair.answer}
                for name in ("source", "page", "split"):
                    if name in row:
                        made[name] = row[name]
                yield made

    def _about(self, page: str) -> list[Pair]:
        """Return the questions about a page that are kept."""
        count = self.settings.per_page
        system = WRITE.format(count=count)
        pairs = read_pairs(self._ask(system, page, TOKENS_A_PAIR * count))
        if not pairs:
            self.dropped["no question that can be read (pages)"] += 1
        kept = []
        for pair in pairs:
            reason = problem_of(pair) or self._repeats(pair) or self._unanswerable(pair, page)
            if reason:
                self.dropped[reason] += 1
            else:
                kept.append(pair)
        return kept

    def _repeats(self, pair: Pair) -> str:
        key = " ".join(re.findall(r"\w+", pair.question.lower()))
        if key in self._known:
            return "asked before"
        self._known.add(key)
        return ""

    def _unanswerable(self, pair: Pair, page: str) -> str:
        """Return why a question cannot be answered from its page; empty where it can."""
        check = self.settings.check
        if check == "none":
            return ""
        if not is_on_page(pair.answer, page):
            return "its answer is not on the page"
        if check == "words":
            return ""
        system = ANSWER.format(page=page, unknown=UNKNOWN)
        second = self._ask(system, pair.question, ANSWER_TOKENS)
        if UNKNOWN.lower() in second.lower():
            return "not answerable from the page"
        return "" if agree(pair.answer, second) else "answered otherwise from the page"

    def _ask(self, system: str, user: str, tokens: int) -> str:
        """Return an answer, from the file where it is known."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        key = digest([self._identity, messages, tokens])
        known = self._replies.find(key)
        if known is not None:
            return known["text"]
        try:
            text = self._client.ask(messages, tokens)
        except TooLong:
            self.dropped["longer than the model's context (questions or pages)"] += 1
            return ""
        except TooCostly as error:
            raise SlimError(
                f"{error} {self._replies.kept()}\nTo go on from them, give a higher --max-tokens."
            ) from error
        except Unreachable as error:
            raise SlimError(
                f"{error}\n{self._replies.kept()} The same command resumes from them."
            ) from error
        self._replies.add(key, {"text": text})
        return text


def _most(counts: Counter) -> str:
    """Return the most frequent reasons."""
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common(2))
