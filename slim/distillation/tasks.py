"""Distillation as a task of a tuner: the teacher is opened and measured, then the student gets its
objective."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from slim.checkpoints.store import Store, digest
from slim.core.console import say, track, warn
from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.core.settings import cache_key
from slim.distillation.cache import TeacherCache, teach, windows_digest, write_cache
from slim.distillation.chunks import chunk_rows
from slim.distillation.matching import LayerMatching, found_map, projector
from slim.distillation.module import Distilling
from slim.distillation.objective import CachedTeacher, LiveTeacher, TokenDistillation
from slim.distillation.teacher import same_vocabulary
from slim.models.logits import head_logits
from slim.training import tune
from slim.training.batches import in_order
from slim.training.fit import autocast
from slim.training.forward import mean_nll, plain_model
from slim.training.module import Optimization
from slim.training.task import Task

if TYPE_CHECKING:
    from slim.distillation.stage import Distillation

CACHE_VERSION = 1


class DistillationTask(Task):
    """Token by token from a teacher with the student's vocabulary."""

    tuner: Distillation

    def __init__(self, tuner: Distillation, *where):
        super().__init__(tuner, *where)
        self.teacher_loss: float | None = None
        self.layers: list[int] | None = None  # the map, where blocks are matched

    # The teacher

    def open_teacher(self) -> nn.Module:
        """Load the teacher and measure it on the validation data."""
        teacher = self.tuner.teacher.load(self.device)
        self.teacher_loss = self.measure(teacher)
        return teacher

    def measure(self, model: nn.Module) -> float:
        with autocast(self.device, self.precision)():
            return mean_nll(model, self.held_out, self.device)

    def introduce(self, student: nn.Module) -> None:
        """Say how teacher and student do before the one teaches the other, and loudly if that makes
        no sense."""
        loss = self.measure(student)
        say(f"Validation loss: teacher {self.teacher_loss:.4f}, student {loss:.4f}")
        if not self.teacher_loss < loss:
            warn(
                "Is it the right checkpoint, and the right data for it?",
                head="The teacher is no better than the student on this data.",
            )

    @property
    def classes(self) -> int:
        """How many logits count: models of one family may pad the same vocabulary to different
        sizes."""
        return min(self.checkpoint.spec.vocab_size, self.tuner.teacher.source.describe().vocab_size)

    # The objective

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        self.require_same_vocabulary()
        teacher = self.cached_teacher() if self.tuner.cache else self.live_teacher()
        self.introduce(model)
        matching = (
            self.matching(plain_model(model), teacher.model) if self.tuner.match.wanted else None
        )
        goal = TokenDistillation(teacher, self.tuner.divergence(), self.tuner.hard_weight, matching)
        return Distilling(model, optimisation, goal, self.projector_rate)

    @property
    def projector_rate(self) -> float:
        """Highest learning rate of projectors: of matrices that are trained in full, whatever the
        student's is."""
        return self.tuner.projector_rate or tune.Full.width_rate / self.checkpoint.spec.hidden_size

    def matching(self, student: nn.Module, teacher: nn.Module) -> LayerMatching:
        """Return the losses on what happens inside, for models that give it."""
        settings = self.tuner.match
        if settings.attention:  # the faster implementations never have the whole map
            student.set_attn_implementation("eager"), teacher.set_attn_implementation("eager")
        own, others = (
            model.get_submodule(spec.family.blocks)
            for model, spec in (
                (student, self.checkpoint.spec), (teacher, self.tuner.teacher.source.describe()),
            )
        )  # fmt: skip
        layers = found_map(own, others) if settings.layers is None else settings.layers
        self.layers = layers
        return LayerMatching(settings, layers, len(others), projector(student, teacher))

    def require_same_vocabulary(self) -> None:
        if not same_vocabulary(self.checkpoint.folder, self.tuner.teacher.checkpoint.folder):
            raise SlimError(self.tuner.vocabulary_problem(self.checkpoint.spec.name))

    def live_teacher(self) -> LiveTeacher:
        return LiveTeacher(self.open_teacher(), self.tuner.temperature, self.classes)

    def facts(self) -> dict:
        return {**super().facts(), **self.distillation_facts()}

    def distillation_facts(self) -> dict:
        """Return what the manifest keeps of the teacher."""
        found = {
            "teacher": self.tuner.teacher.source.label,
            "teacher_validation_loss": self.teacher_loss,
        }
        return found | ({} if self.layers is None else {"matched_blocks": self.layers})

    # The cache

    def cached_teacher(self) -> CachedTeacher:
        """Return the teacher's distributions from disk, put there first where they are not."""
        what = self.cache_identity()
        root = Path(self.tuner.cache_folder).expanduser()
        folder = (
            root / digest(what) if self.tuner.cache is True else Path(self.tuner.cache).expanduser()
        )
        store = Store(folder.parent)
        with store.lock(folder):
            if not folder.is_dir():
                with store.writing(folder) as partial:
                    self.fill_cache(partial, what)
                gc.collect()
        cache = TeacherCache(folder, self.training, what)
        self.teacher_loss = cache.facts["validation_loss"]
        return CachedTeacher(cache, self.tuner.temperature, self.classes)

    def cache_identity(self) -> dict:
        """Return what determines the cache, by the names that an error would use."""
        stage, folder = self.tuner, self.checkpoint.folder
        template = getattr(self.tokenizer, "chat_template", None) or ""
        numbers = folder / "tokenizer.json"
        return {
            "version": CACHE_VERSION,
            "teacher": [stage.teacher.digest, stage.dtype, stage.quant, self.precision],
            "tokenizer": sha256(numbers)
            if numbers.is_file()
            else digest(self.tokenizer.get_vocab()),
            "template": digest(template),
            "data": cache_key(stage.data),
            "windows": windows_digest(self.training),
            "validation": windows_digest(self.validation),
            "temperature": stage.temperature,
            "top_k": self.top_k,
        }

    @property
    def top_k(self) -> int:
        """Tokens kept; there must be one more, or nothing is left for the class of all others."""
        return min(self.tuner.top_k, self.classes - 1)

    @torch.no_grad()
    def fill_cache(self, folder: Path, what: dict) -> None:
        live = self.live_teacher()
        batches = track(in_order(self.training, self.tuner.rows), "Asking the teacher")
        with autocast(self.device, self.precision)():
            kept = teach(
                lambda batch: live.rows(to_device(batch, self.device))[0][0],
                lambda hidden: head_logits(live.model, hidden)[:, : self.classes],
                batches, self.tuner.temperature, self.top_k, chunk_rows(self.classes),
            )  # fmt: skip
            write_cache(folder, kept, what, {"validation_loss": self.teacher_loss})


def to_device(batch: dict, device: str) -> dict:
    """Return the batch with its tensors on ``device``."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
