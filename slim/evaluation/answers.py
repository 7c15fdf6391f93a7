"""Answers to questions with a reference: generated greedily, kept question by question, compared by
meaning.

A judge and the similarity work on them. The questions are a JSON Lines file of one's own, or those
that the embedded model was not trained on."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.source import EMBEDDED as MODELS
from slim.core.console import track, warn
from slim.core.errors import SlimError
from slim.core.settings import require_flag, require_number
from slim.data.chat import render_chat, require_chat_template
from slim.data.text import ASSETS, Text
from slim.evaluation.generation import continue_ids
from slim.evaluation.similarity import check_encoder, cosines, encoder_cache_key, encoder_name
from slim.evaluation.tasks import mean

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec

# names that stand for a file: questions that the embedded model's training left out
EMBEDDED = {"tiny:questions": ASSETS / "tiny_world" / "conversations_validation.jsonl"}


@dataclass
class Answers:
    """Which questions, how they are asked, and what the answers are compared with.

    Attributes:
        questions: ``tiny:questions`` or a .jsonl file with a question a line.
        question: name of the field with the question.
        reference: name of the field with the answer to compare with.
        limit: number of questions from the start; None for all.
        new_tokens: most tokens generated for each answer.
        chat: ask through the tokenizer's chat template, as models tuned for conversation want it.
        system: what the system says first in such a chat; None for nothing.
        similarity: embedding model (a checkpoint folder, ``tiny``, or a hub id with
            sentence-transformers); None compares nothing.
    """

    cache_name: ClassVar[str] = "Answers"

    questions: str = "tiny:questions"
    question: str = "instruction"
    reference: str = "answer"
    limit: int | None = 40
    new_tokens: int = 64
    chat: bool = False
    system: str | None = None
    similarity: str | None = None

    def __post_init__(self) -> None:
        require_number("eval.answers.new_tokens", self.new_tokens, 1, integer=True)
        if self.limit is not None:
            require_number("eval.answers.limit", self.limit, 1, integer=True)
        require_flag("eval.answers.chat", self.chat)
        if self.system is not None and not self.chat:
            raise SlimError(
                "eval.answers.system is said in a chat only: add eval.answers.chat=true, or leave "
                "it out."
            )
        if self.similarity in MODELS:
            self.similarity = str(MODELS[self.similarity])
        # a part of its own, not a base class: the text's own settings are none of eval.answers
        self._text = Text(str(EMBEDDED.get(self.questions, self.questions)))

    def cache_key(self) -> dict:
        settings = ("question", "reference", "limit", "new_tokens", "chat", "system")
        asked = {name: getattr(self, name) for name in settings}
        return {**self._text.text_identity(), **asked, "similarity": self._encoder_identity()}

    def _encoder_identity(self) -> str | dict | None:

        if self.similarity is None:
            return None
        return encoder_cache_key(self.similarity)

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for questions that cannot be read or have no room in the context of
        ``spec``, and for an embedding model that cannot be used."""
        self.pairs()  # raises for rows without a question
        if self.similarity is not None:
            check_encoder(self.similarity)
        if self.new_tokens >= spec.context_length:
            raise SlimError(
                f"eval.answers.new_tokens={self.new_tokens} leaves no room for a question in the "
                f"context of {spec.context_length} tokens of {spec.name}. Use fewer."
            )

    def check_tokenizer(self, tokenizer) -> None:
        """Raise ``SlimError`` if a chat is asked for and there is no template for it."""
        if self.chat:
            require_chat_template(
                tokenizer,
                "Ask it plainly with eval.answers.chat=false, or add a chat_template.jinja to its "
                "folder.",
                "eval.answers.chat=true, but the model's tokenizer",
            )

    def pairs(self) -> list[tuple[str, str]]:
        """Return questions and references.

        Raises:
            SlimError: naming the row, when one of them is missing; also when there are none.
        """
        pairs = []
        for number, row in enumerate(itertools.islice(self._text.rows(), self.limit), 1):
            for name in (self.question, self.reference):
                if not isinstance(row.get(name), str) or not row[name].strip():
                    raise SlimError(
                        f"{self.questions}, row {number}: no text in the field '{name}' (has: "
                        f"{', '.join(row)}). "
                        "Name the fields with eval.answers.question= and eval.answers.reference="
                    )
            pairs.append((row[self.question], row[self.reference]))
        if not pairs:
            raise SlimError(f"There are no questions in {self.questions}.")
        return pairs

    def prompt(self, tokenizer, question: str) -> list[int]:
        """Return the tokens that the model continues.

        Args:
            tokenizer: of the checkpoint.
            question: text of a question.
        """
        if not self.chat:
            return tokenizer(question)["input_ids"]
        messages = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": question})
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        # the template writes the special tokens itself
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Answer all questions.

        Args:
            model: a torch module of transformers.
            tokenizer: of the checkpoint.
            context_length: tokens that the model has room for.

        Returns:
            ``metrics`` (``similarity/mean`` and ``similarity/median``, if asked for), ``protocol``,
            and ``records``: ``question``, ``reference``, ``answer`` and, if asked for,
            ``similarity`` (cosine, -1 to 1) of every question.

        Raises:
            SlimError: when a question has no tokens, or the tokenizer lacks a chat template.
        """
        self.check_tokenizer(tokenizer)
        rows = []
        cut = 0
        # prompt and answer share the context
        room = context_length - self.new_tokens
        for question, reference in track(self.pairs(), "answers"):
            ids = self.prompt(tokenizer, question)
            if not ids:
                raise SlimError(
                    f"The question {question!r} in {self.questions} has no tokens. Leave it out."
                )
            if len(ids) > room:
                cut += 1
                ids = ids[-room:]  # what is asked mostly comes last
            answer = continue_ids(model, tokenizer, ids, self.new_tokens).strip()
            rows.append({"question": question, "reference": reference, "answer": answer})
        if cut:
            warn(
                f"{cut} of {len(rows)} questions in {self.questions} are longer than the {room} "
                "tokens that the context has room for: their beginnings are cut."
            )
        protocol = {
            "questions": len(rows),
            "new_tokens": self.new_tokens,
            "chat": self.chat,
            "system": self.system,
        }
        # without a comparison the answers are there for a judge and for people
        if self.similarity is None:
            return {"metrics": {}, "protocol": protocol, "records": rows}
        return self._compared(rows, protocol, model.device.type)

    def _compared(self, rows: list[dict], protocol: dict, device: str) -> dict:
        """Return what :meth:`measure` does, with the similarity of every row."""
        answers = [row["answer"] for row in rows]
        references = [row["reference"] for row in rows]
        values = cosines(answers, references, self.similarity, device)
        for row, value in zip(rows, values, strict=True):
            row["similarity"] = value
        average = mean(values)
        median = average
        # NaN stays NaN: a median would sort it anywhere
        if not math.isnan(average):
            median = statistics.median(values)
        return {
            "metrics": {"similarity/mean": average, "similarity/median": median},
            "protocol": {**protocol, "encoder": encoder_name(self.similarity)},
            "records": rows,
        }
