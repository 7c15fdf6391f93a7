"""Pages translated and pictures described by a server, each once: answers are kept."""

from __future__ import annotations

import base64

from slim.checkpoints.store import digest
from slim.core.console import progress_bar
from slim.core.endpoint import Budget, TooCostly, Unreachable
from slim.core.errors import SlimError
from slim.core.replies import Replies
from slim.documents.lengths import Passage
from slim.documents.reading import File, PageStore
from slim.documents.report import Report
from slim.documents.settings import DocumentSettings

TRANSLATE = (
    "Translate the user's text into the language '{language}'. Keep line breaks, Markdown, code, "
    "formulas and names. If it is in that language already, repeat it. Answer with the text alone."
)
DESCRIBE = (
    "Describe this picture from a document in at most three sentences: what it shows, its labels "
    "and its numbers. Do not guess what cannot be seen."
)
DESCRIPTION_TOKENS = 200
CHARACTERS_PER_TOKEN = 2  # of a language whose words take many tokens
LONGEST = 3.0  # times the original; a longer translation is something else
SHORTEST = 0.2  # times the original
SOME = 200  # characters, by which a translation may be longer in any case
HOPELESS = 3  # useless answers in a row, after which a server is given up


class Asking:
    """Asks the server of the settings, if they name one.

    Args:
        settings: whether and whom to ask.
        store: keeps the answers, and the pictures that are shown.

    Attributes:
        budget: of all questions together.
        descriptions: of pictures by their names.
    """

    def __init__(self, settings: DocumentSettings, store: PageStore):
        self.settings = settings
        self.store = store
        self.budget = Budget(settings.max_tokens)
        self.descriptions: dict[str, str] = {}
        self._replies: Replies | None = None
        self._useless = 0

    def translated(self, file: File, passages: list[Passage], report: Report) -> list[Passage]:
        """Return the pages in the language asked for; those without a usable translation are left
        out.

        Args:
            file: whose pages they are.
            passages: one for each page; their text is replaced.
            report: of what is left out.

        Raises:
            SlimError: when the server is down, refuses, or costs more than the limit.
        """
        if not self.settings.translate:
            return passages
        system = TRANSLATE.format(language=self.settings.translate)
        kept = []
        with progress_bar(f"translate {file.source}", len(passages)) as advance:
            for passage in passages:
                advance()
                if not passage.text.strip():
                    kept.append(passage)
                    continue
                messages = [
                    {"role": "system", "content": system},
                    {"role": "user", "content": passage.text},
                ]
                tokens = len(passage.text) // CHARACTERS_PER_TOKEN + SOME
                text = self._ask("translator", str(self.settings.model), messages, tokens)
                if _is_translation(passage.text, text):
                    passage.text = text.strip()
                    kept.append(passage)
                    self._useless = 0
                    continue
                report.drop(file.source, passage.first, "page", "no usable translation")
                self._count_useless("translation", text)
        return kept

    def describe(self, file: File, passages: list[Passage], report: Report) -> None:
        """Add descriptions of their pictures to the texts of pages.

        Args:
            file: whose pages they are.
            passages: one for each page.
            report: of pictures without a description.

        Raises:
            SlimError: as :meth:`translated`.
        """
        if not self.settings.describe:
            return
        pictures = [(passage, *item) for passage in passages for item in passage.pictures]
        with progress_bar(f"pictures of {file.source}", len(pictures)) as advance:
            for passage, page, picture in pictures:
                advance()
                path = self.store.pictures / f"{picture.name}.png"
                if not path.is_file():
                    report.drop(file.source, page, "picture", "in a form that cannot be shown")
                    continue
                text = self._described(path.read_bytes(), picture.name)
                if not text:
                    report.drop(file.source, page, "picture", "no usable description")
                    self._count_useless("description", text)
                    continue
                self._useless = 0
                self.descriptions[picture.name] = text
                passage.text = f"{passage.text}\n\n[Picture: {text}]".strip()

    def _described(self, content: bytes, name: str) -> str:
        """Return the description of a picture, on one line."""
        instruction = DESCRIBE
        if self.settings.translate:
            instruction += f" Write in the language '{self.settings.translate}'."
        data = base64.b64encode(content).decode()
        parts = [
            {"type": "text", "text": instruction},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        ]
        model = str(self.settings.vision_model or self.settings.model)
        known_by = [{"role": "user", "content": [instruction, name]}]
        text = self._ask(
            "model that describes pictures",
            model,
            [{"role": "user", "content": parts}],
            DESCRIPTION_TOKENS,
            known_by,
        )
        return " ".join(text.split())

    def _ask(
        self, role: str, model: str, messages: list[dict], tokens: int, known_by: object = None
    ) -> str:
        """Return an answer, from the file where it is known.

        Args:
            role: what the server is, for messages.
            model: that is asked.
            messages: of the chat.
            tokens: most tokens of the answer.
            known_by: what stands for the messages in the answer's key; None: the messages.
        """
        if self._replies is None:
            self._replies = Replies(self.store.folder / "answers.jsonl", "answers")
        key = digest([model, known_by or messages])
        known = self._replies.find(key)
        if known is not None:
            return known["text"]
        try:
            text = self.settings.asked(role, model, self.budget).ask(messages, tokens)
        except TooCostly as error:
            raise SlimError(
                f"{error} {self._replies.kept()}\nTo go on from them, give a higher "
                f"{self.settings.named('max_tokens')}."
            ) from error
        except Unreachable as error:
            raise SlimError(
                f"{error}\n{self._replies.kept()} The same command resumes from them."
            ) from error
        if text.strip():
            self._replies.add(key, {"text": text})
        return text

    def _count_useless(self, what: str, text: str) -> None:
        """Give a server up that answers nonsense again and again."""
        self._useless += 1
        if self._useless >= HOPELESS:
            raise SlimError(
                f"{self.settings.endpoint} gave no usable {what} {self._useless} times in a row; "
                f"the last answer: {text[:80]!r}. Use another {self.settings.named('model')}."
            )


def _is_translation(original: str, text: str) -> bool:
    """Whether a text may be a translation of another, by its length."""
    size = len(text.strip())
    return SHORTEST * len(original) <= size <= LONGEST * len(original) + SOME
