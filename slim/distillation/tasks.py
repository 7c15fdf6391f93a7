"""Distillation as a task of a tuner: the teacher is opened and measured, then the student gets its
objective."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor, nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.store import Store, digest
from slim.core.console import say, track, warn
from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.core.settings import cache_key
from slim.distillation.cache import TeacherCache, teach, windows_digest, write_cache
from slim.distillation.chunks import chunk_rows
from slim.distillation.matching import LayerMatching, nearest_map, projector
from slim.distillation.module import Distilling
from slim.distillation.objective import CachedTeacher, LiveTeacher, TokenDistillation
from slim.distillation.plan import DistillationPlan
from slim.distillation.teacher import same_vocabulary
from slim.models.logits import head_logits
from slim.models.spec import ModelSpec
from slim.training.batches import in_order
from slim.training.fit import autocast
from slim.training.forward import mean_nll, plain_model
from slim.training.module import Optimization
from slim.training.task import Task

CACHE_VERSION = 1


class DistillationTask(Task):
    """Token by token from a teacher with the student's vocabulary.

    Attributes:
        teacher_loss: The teacher's validation loss, in nats per token; None before it is measured.
        layers: The teacher's block that each of the student's stands for, where blocks are matched.
    """

    plan: DistillationPlan

    def __init__(self, plan: DistillationPlan, checkpoint: Checkpoint, device: str, precision: str):
        super().__init__(plan, checkpoint, device, precision)
        self.teacher_loss: float | None = None
        self.layers: list[int] | None = None

    # The teacher

    @property
    def teacher_spec(self) -> ModelSpec:
        """Description of the teacher."""
        return self.plan.teacher.source.describe()

    def open_teacher(self) -> nn.Module:
        """Load the teacher and measure it on the validation data."""
        teacher = self.plan.teacher.load(self.device)
        self.teacher_loss = self.measure(teacher)
        return teacher

    def measure(self, model: nn.Module) -> float:
        """Return the validation loss of a model, in nats per token.

        Args:
            model: Teacher or student.
        """
        with autocast(self.device, self.precision)():
            return mean_nll(model, self.held_out, self.device)

    def introduce(self, student: nn.Module) -> None:
        """Print how teacher and student do before the one teaches the other, and warn if that makes
        no sense.

        Args:
            student: The untrained student.
        """
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
        return min(self.checkpoint.spec.vocab_size, self.teacher_spec.vocab_size)

    # The objective

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        self.require_same_vocabulary()
        plan = self.plan
        teacher = self.cached_teacher() if plan.cache else self.live_teacher()
        self.introduce(model)
        matching = None
        if plan.match.wanted:
            matching = self.matching(plain_model(model), teacher.model)
        goal = TokenDistillation(teacher, plan.divergence, plan.hard_weight, matching)
        return Distilling(model, optimisation, goal, plan.projector_rate)

    def matching(self, student: nn.Module, teacher: nn.Module) -> LayerMatching:
        """Return the losses on what happens inside.

        Args:
            student: Plain.
            teacher: Plain; both are made to give attention maps where these are compared.
        """
        settings = self.plan.match
        if settings.attention:  # the faster implementations never have the whole map
            student.set_attn_implementation("eager")
            teacher.set_attn_implementation("eager")
        student_blocks = student.get_submodule(self.checkpoint.spec.family.blocks)
        teacher_blocks = teacher.get_submodule(self.teacher_spec.family.blocks)
        self.layers = settings.layers
        if self.layers is None:
            self.layers = nearest_map(student_blocks, teacher_blocks)
        projection = projector(student, teacher)
        return LayerMatching(settings, self.layers, len(teacher_blocks), projection)

    def require_same_vocabulary(self) -> None:
        """Compare the vocabularies of teacher and student.

        Raises:
            SlimError: They differ.
        """
        plan, student = self.plan, self.checkpoint
        if not same_vocabulary(student.folder, plan.teacher.checkpoint.folder):
            raise SlimError(plan.teacher.vocabulary_problem(student.spec.name, plan.loss))

    def live_teacher(self) -> LiveTeacher:
        """Return the teacher that is asked for every batch."""
        return LiveTeacher(self.open_teacher(), self.plan.temperature, self.classes)

    def metadata(self) -> dict:
        return {**super().metadata(), **self.teacher_metadata()}

    def teacher_metadata(self) -> dict:
        """Return what the manifest keeps of the teacher.

        Returns:
            ``teacher`` (its label), ``teacher_validation_loss`` (nats per token) and, where blocks
            are matched, ``matched_blocks``.
        """
        metadata = {
            "teacher": self.plan.teacher.source.label,
            "teacher_validation_loss": self.teacher_loss,
        }
        if self.layers is not None:
            metadata["matched_blocks"] = self.layers
        return metadata

    # The cache

    def cached_teacher(self) -> CachedTeacher:
        """Return the teacher's distributions from disk, put there first where they are not."""
        cache_key = self.cache_key()
        folder = self.cache_folder(cache_key)
        store = Store(folder.parent)
        with store.lock(folder):
            if not folder.is_dir():
                with store.writing(folder) as partial:
                    self.fill_cache(partial, cache_key)
                gc.collect()  # the teacher is no longer needed
        cache = TeacherCache(folder, self.training, cache_key)
        self.teacher_loss = cache.metadata["validation_loss"]
        return CachedTeacher(cache, self.plan.temperature, self.classes)

    def cache_folder(self, cache_key: dict) -> Path:
        """Return where the teacher's distributions are kept.

        Args:
            cache_key: What determines them.
        """
        if self.plan.cache is True:
            return Path(self.plan.cache_folder).expanduser() / digest(cache_key)
        return Path(self.plan.cache).expanduser()

    def cache_key(self) -> dict:
        """Return what determines the cache, by the names that an error would use."""
        teacher, folder = self.plan.teacher, self.checkpoint.folder
        template = getattr(self.tokenizer, "chat_template", None) or ""
        path = folder / "tokenizer.json"
        tokenizer = sha256(path) if path.is_file() else digest(self.tokenizer.get_vocab())
        return {
            "version": CACHE_VERSION,
            "teacher": [teacher.digest, teacher.dtype, teacher.quant, self.precision],
            "tokenizer": tokenizer,
            "template": digest(template),
            "data": cache_key(self.plan.data),
            "windows": windows_digest(self.training),
            "validation": windows_digest(self.validation),
            "temperature": self.plan.temperature,
            "top_k": self.top_k,
        }

    @property
    def top_k(self) -> int:
        """Tokens kept; there must be one more, or nothing is left for the class of all others."""
        return min(self.plan.top_k, self.classes - 1)

    @torch.no_grad()
    def fill_cache(self, folder: Path, cache_key: dict) -> None:
        """Ask the teacher about all training windows and write what it says.

        Args:
            folder: Empty.
            cache_key: What determines the cache.
        """
        live = self.live_teacher()
        batches = track(in_order(self.training, self.plan.rows), "Asking the teacher")

        def hidden_of(batch: dict) -> Tensor:
            (hidden,), _ = live.rows(to_device(batch, self.device))
            return hidden

        def head(hidden: Tensor) -> Tensor:
            return head_logits(live.model, hidden)[:, : self.classes]

        with autocast(self.device, self.precision)():
            rows = teach(
                hidden_of,
                head,
                batches,
                self.plan.temperature,
                self.top_k,
                chunk_rows(self.classes),
            )
            write_cache(folder, rows, cache_key, {"validation_loss": self.teacher_loss})


def to_device(batch: dict, device: str) -> dict:
    """Return the batch with its tensors on a device.

    Args:
        batch: Tensors and plain values by name.
        device: Torch's name of it.
    """
    moved = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
    return moved
