"""How documents are read and made into records."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from slim.core.endpoint import Budget, Endpoint, require_address
from slim.core.errors import SlimError
from slim.core.settings import require_choice, require_flag, require_number

NOT_IN_KEY = {"cache_key": False}  # changes no result


@dataclass
class DocumentSettings:
    """What is kept of documents, and in what pieces.

    Attributes:
        ocr: ``"auto"`` reads pages without text by OCR, ``"always"`` all pages of PDFs, ``"never"``
            leaves scans out.
        languages: of scans, as Tesseract names them, such as ``deu+eng``.
        tables: ``"keep"`` (as Markdown) or ``"drop"``.
        code: ``"keep"`` (between fences) or ``"drop"``.
        join: neighboring pages of a document that make one record, 1 or more.
        length: characters of a page, by which long ones are split and short ones joined; None: the
            mean of all pages.
        least: characters; shorter records are dropped.
        similarity: from 0 to 1; pages whose words agree by so much with an earlier page are
            dropped; 1: only equal ones; None: none.
        validation_fraction: share of the documents, 0 to 0.5.
        test_fraction: as ``validation_fraction``.
        split_by: ``"document"`` keeps all pages of a document on one side; ``"page"``, for a single
            document, does not.
        seed: of the choice of documents kept apart.
        max_pages: of one file; those after it are left out.
        max_megabytes: of one file; larger ones are left out.
        translate: language that pages are translated into, such as ``en``; None: into none.
        describe: have pictures described, and add that to their page's text.
        endpoint: server that translates and describes, such as ``http://127.0.0.1:8000/v1``.
        model: name of the model there.
        vision_model: name of the one that describes pictures; None: ``model``.
        key_variable: environment variable with the server's key.
        max_tokens: most tokens of all questions and answers of a run; None: no limit.
        timeout: seconds waited for one answer.
        retries: further tries after the first.
        wait: seconds before the second try, doubled each time.
        jobs: processes that read; None: one for each core.
    """

    ocr: str = "auto"
    languages: str = "eng"
    tables: str = "keep"
    code: str = "keep"
    join: int = 1
    length: int | None = None
    least: int = 20
    similarity: float | None = 0.9
    validation_fraction: float = 0.1
    test_fraction: float = 0.0
    split_by: str = "document"
    seed: int = 0
    max_pages: int = 5000
    max_megabytes: int = 500
    translate: str | None = None
    describe: bool = False
    endpoint: str | None = field(default=None, metadata=NOT_IN_KEY)
    model: str | None = None
    vision_model: str | None = None
    key_variable: str = field(default="OPENAI_API_KEY", metadata=NOT_IN_KEY)
    max_tokens: int | None = field(default=1_000_000, metadata=NOT_IN_KEY)
    timeout: float = field(default=120.0, metadata=NOT_IN_KEY)
    retries: int = field(default=3, metadata=NOT_IN_KEY)
    wait: float = field(default=1.0, metadata=NOT_IN_KEY)
    jobs: int | None = field(default=None, metadata=NOT_IN_KEY)

    prefix: ClassVar[str] = "--"  # of settings as the user types them

    def __post_init__(self) -> None:
        self._check_reading()
        self._check_pieces()
        self._check_endpoint()

    def named(self, name: str) -> str:
        """Return a setting as the user types it: ``--max-pages`` or ``data.max_pages``."""
        return self.prefix + (name.replace("_", "-") if self.prefix == "--" else name)

    def typed(self, name: str, value: Any) -> str:
        """Return a setting with a value, as the user types it.

        Args:
            name: of the field.
            value: of the setting.
        """
        return f"{self.named(name)}{' ' if self.prefix == '--' else '='}{value}"

    def _check_reading(self) -> None:
        require_choice(self.named("ocr"), self.ocr, ("auto", "always", "never"))
        if not isinstance(self.languages, str) or not re.fullmatch(
            r"[A-Za-z_]+(\+[A-Za-z_]+)*", self.languages
        ):
            raise SlimError(
                f"{self.typed('languages', self.languages)}: must be names of Tesseract's "
                "languages, such as eng, deu or deu+eng."
            )
        for name in ("tables", "code"):
            require_choice(self.named(name), getattr(self, name), ("keep", "drop"))
        for name in ("max_pages", "max_megabytes"):
            require_number(self.named(name), getattr(self, name), 1, integer=True)
        if self.jobs is not None:
            require_number(self.named("jobs"), self.jobs, 1, integer=True)

    def _check_pieces(self) -> None:
        require_number(self.named("join"), self.join, 1, integer=True)
        if self.length is not None:
            require_number(self.named("length"), self.length, 50, integer=True)
        for name in ("least", "seed"):
            require_number(self.named(name), getattr(self, name), 0, integer=True)
        if self.similarity is not None:
            require_number(self.named("similarity"), self.similarity, 0.5, 1)
        for name in ("validation_fraction", "test_fraction"):
            require_number(self.named(name), getattr(self, name), 0, 0.5)
        require_choice(self.named("split_by"), self.split_by, ("document", "page"))

    def _check_endpoint(self) -> None:
        require_flag(self.named("describe"), self.describe)
        require_address(self.named("endpoint"), self.endpoint)
        if self.max_tokens is not None:
            require_number(self.named("max_tokens"), self.max_tokens, 1, integer=True)
        require_number(self.named("retries"), self.retries, 0, integer=True)
        for name in ("timeout", "wait"):
            require_number(self.named(name), getattr(self, name), 0)
        if not self.asks:
            return
        what = "translate" if self.translate else "describe"
        if self.endpoint is None or not (self.model or (self.vision_model and not self.translate)):
            raise SlimError(
                f"{self.named(what)} needs a model: {self.typed('endpoint', 'http://HOST:PORT/v1')}"
                f" {self.typed('model', 'NAME')}"
            )

    @property
    def asks(self) -> bool:
        """Whether a server is asked at all."""
        return bool(self.translate) or self.describe

    def asked(self, role: str, model: str, budget: Budget) -> Endpoint:
        """Return the server as it is asked for one thing.

        Args:
            role: what it is, for messages.
            model: name of the model there.
            budget: what may be asked.
        """
        return Endpoint(
            str(self.endpoint), model, self.key_variable, self.timeout, self.retries, self.wait,
            role, budget,
        )  # fmt: skip

    def record_key(self) -> dict[str, Any]:
        """Return the settings that determine the records, as plain values."""
        key = {}
        for setting in fields(DocumentSettings):
            if setting.metadata.get("cache_key", True):
                key[setting.name] = getattr(self, setting.name)
        if not self.asks:
            del key["model"], key["vision_model"]
        return key
