"""Any program of one's own as a pruner or a quantizer: a YAML names its packages, its Python and a
worker script (docs/backends.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slim.backends.environment import Environment, Pins
from slim.backends.stage import IsolatedStage
from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.core.settings import require_flag
from slim.models.spec import ModelSpec

PINNED = re.compile(r"[A-Za-z0-9._-]+(\[[^\]]+\])?\s*(==\s*[^\s,;*]+|@\s*\S+)")


@dataclass
class External(IsolatedStage):
    """Settings of a program of one's own.

    Attributes:
        name: What tables call it, and its environment's name.
        worker_file: Its script, run as ``python WORKER REQUEST.json``.
        packages: Everything that it needs, each pinned as ``name==version``; what these need in
            turn is not installed by itself.
        share_torch: Whether slim's torch is shared with it.
        python: A version such as ``"3.10"``, or an interpreter's file; None: slim's own.
        settings_for_worker: Handed over under ``settings``.
    """

    name: str = "external"
    worker_file: str | None = None
    packages: list | None = None
    share_torch: bool = False
    python: str | None = None
    settings_for_worker: dict | None = None

    setting: ClassVar[str]  # the group as it is typed

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.setting
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise SlimError(f"{group}.name={self.name}: use small letters, digits and underscores.")
        if self.worker_file is None or not Path(self.worker_file).expanduser().is_file():
            raise SlimError(
                f"{group}.worker_file={self.worker_file}: must be a Python script that is there. "
                "docs/backends.md has an example."
            )
        require_flag(f"{group}.share_torch", self.share_torch)
        self.packages = list(self.packages or [])
        self.settings_for_worker = dict(self.settings_for_worker or {})
        for package in self.packages:
            if not PINNED.fullmatch(str(package)):
                raise SlimError(
                    f"{group}.packages: '{package}' is not pinned. Write name==version, so that "
                    "the environment is the same everywhere."
                )
        if self.python is not None:
            self.python = str(self.python)

    @property
    def title(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.kind} {self.name}"

    @property
    def worker(self) -> Path:
        return Path(self.worker_file).expanduser().absolute()

    def environment(self) -> Environment:
        return Environment(
            name=self.name,
            pins=Pins(tuple(map(str, self.packages))),
            root=Path(self.environments).expanduser().absolute(),
            torch=">=2" if self.share_torch else None,
            python=self.python,
        )

    def cache_key(self) -> dict:
        """The settings, and the worker by its content."""
        key = super().cache_key()
        key["worker_file"] = sha256(self.worker)
        return key

    def settings(self) -> dict[str, Any]:
        return self.settings_for_worker

    def check(self, spec: ModelSpec) -> None:
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        spec.require_plain("Use the model it was made from.")


@dataclass
class ExternalPruning(External):
    """Settings of a pruner of one's own."""

    kind: ClassVar[str] = "prune"
    cache_name: ClassVar[str] = "ExternalPruning"
    version: ClassVar[int] = 1
    setting: ClassVar[str] = "pruner"


@dataclass
class ExternalQuantization(External):
    """Settings of a quantizer of one's own. Its result is a checkpoint in any format that slim
    reads."""

    kind: ClassVar[str] = "quantize"
    cache_name: ClassVar[str] = "ExternalQuantization"
    version: ClassVar[int] = 1
    setting: ClassVar[str] = "quant"
