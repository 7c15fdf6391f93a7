"""Distillation as a stage: a checkpoint is trained on what a teacher says, by adapters or in all
its weights.

The training itself (data, steps, adapters, merging, best state) is that of ``slim.training.tune``;
what is minimised is in ``objective.py``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.source import has_weights
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import dataclass_cache_key, require_choice, require_number
from slim.distillation import CHUNK_ELEMENTS
from slim.distillation.layer_map import Matching
from slim.distillation.questions import ANSWERS, Generation
from slim.distillation.teacher import BASE, DTYPES, QUANTS, Teacher, same_vocabulary
from slim.training import qlora, tune

if TYPE_CHECKING:
    from slim.checkpoints.checkpoint import Checkpoint
    from slim.distillation import dskd, losses, on_policy, tasks
    from slim.models.spec import ModelSpec
else:
    dskd, losses, on_policy, tasks = (
        LazyModule(f"slim.distillation.{name}") for name in ("dskd", "losses", "on_policy", "tasks")
    )

# Losses, and the setting of each that has one.
LOSSES = {
    "forward": None,
    "reverse": None,
    "symmetric": "beta",
    "skewed": "skew",
    "skewed_reverse": "skew",
    "adaptive": "head",
}
FUNCTIONS = {"forward": "forward_kl", "reverse": "reverse_kl"}
CHOSEN_ONLY = {"cache_key": False}  # in the identity by the teacher's content


@dataclass
class Distillation(tune.Tuner):
    """What to learn from whom; how to train is in :class:`slim.training.tune.Tuner`.

    base: where the chain begins. model: ``base`` for that as the teacher, or a checkpoint folder or
        hub id.
    revision: of a hub model. dtype: of the teacher's weights.
    method: ``token`` compares distributions token by token, ``dskd`` in both models' spaces,
        whatever the tokenizers;
    align: with different tokenizers, ``exact`` compares tokens before which both models have read
    the same text, ``attention`` lets each token of one attend to all of the other's;
    projector_rate: highest learning rate of projectors between both models; None: ``full``
        training's rate.
    loss: ``forward``, ``reverse``, ``symmetric``, ``skewed``, ``skewed_reverse`` or ``adaptive``,
        see ``losses.py``;
    beta, skew, head: of the symmetric, the two skewed and the adaptive one.
    temperature: both distributions are softened by it. hard_weight: of the hard labels; the teacher
        has the rest.
    quant: ``nf4`` or ``int8`` quantises the teacher. cache: keep its ``top_k`` most likely tokens
        in ``cache_folder``, or, where it is a path, in that folder. match: further losses on hidden
        states and attention maps.
    answers: whose answers to learn on: ``data``, ``teacher``, ``student``, ``both``; generation:
    how they are made."""

    base: object = field(default=None, metadata=CHOSEN_ONLY)
    model: str = field(default=BASE, metadata=CHOSEN_ONLY)
    revision: str | None = field(default=None, metadata=CHOSEN_ONLY)
    dtype: str = "auto"
    method: str = "token"
    align: str = "exact"
    projector_rate: float | None = None
    loss: str = "forward"
    temperature: float = 2.0
    hard_weight: float = 0.5
    beta: float = 0.5
    skew: float = 0.1
    head: float = 0.5
    quant: str | None = None
    cache: bool | str = field(default=False, metadata=CHOSEN_ONLY)
    top_k: int = 64
    cache_folder: str = field(default="runs/teacher", metadata=CHOSEN_ONLY)
    match: Matching = field(default_factory=Matching)
    answers: str = "data"
    generation: Generation = field(default_factory=Generation)

    kind: ClassVar[str] = "distill"
    group: ClassVar[str] = "teacher"
    title: ClassVar[str] = "Distilling"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.model, str) or not self.model:
            raise SlimError(
                "teacher.model is missing. Give base (the model the chain begins with), a folder or a hub id."
            )
        require_choice("teacher.dtype", self.dtype, DTYPES)
        require_choice("teacher.loss", self.loss, LOSSES)
        require_number("teacher.temperature", self.temperature, 0.01, 100)
        require_number("teacher.hard_weight", self.hard_weight, 0, 1)
        for name in ("beta", "skew"):
            require_number(f"teacher.{name}", getattr(self, name), 1e-6, 1 - 1e-6)
        require_number("teacher.head", self.head, 0, 1)
        require_number("teacher.top_k", self.top_k, 1, integer=True)
        require_choice("teacher.quant", self.quant, QUANTS)
        self._check_combination()
        if self.projector_rate is not None:
            require_number("teacher.projector_rate", self.projector_rate, 1e-9, 1)
        self.teacher = Teacher(self.base, self.model, self.revision, self.dtype, self.quant)

    def _check_combination(self) -> None:
        require_choice("teacher.method", self.method, ("token", "dskd"))
        require_choice("teacher.align", self.align, ("exact", "attention"))
        require_choice("teacher.answers", self.answers, ANSWERS)
        if self.method == "dskd" and (self.cache or self.match.wanted or self.answers != "data"):
            raise SlimError(
                "teacher.method=dskd works without teacher.cache, teacher.match and made answers: leave them out."
            )
        if self.cache and self.match.wanted:
            raise SlimError(
                "teacher.cache keeps probabilities only, and teacher.match needs the teacher's hidden states. "
                "Use teacher.cache=false, or teacher.match.hidden=0 teacher.match.attention=0."
            )
        if self.answers == "data":
            return
        self.generation.check(self.window, self.accumulation)
        if self.cache:
            raise SlimError(
                f"teacher.answers={self.answers} makes new answers in every step: set teacher.cache=false."
            )
        if self.hard_weight and self.answers != "teacher":
            raise SlimError(
                f"teacher.answers={self.answers} has no right answers to learn by heart: set teacher.hard_weight=0 "
                "(as teacher=on_policy does)."
            )

    def cache_key(self) -> dict:
        unused = {
            setting for setting in LOSSES.values() if setting not in (None, LOSSES[self.loss])
        }
        unused |= set() if self.method == "dskd" else {"align"}
        unused |= {"generation"} if self.answers == "data" else set()
        unused |= set() if self.match.wanted else {"match"}
        # the only trace that a cache leaves in the result
        unused |= set() if self.cache else {"top_k"}
        settings = {
            name: value for name, value in dataclass_cache_key(self).items() if name not in unused
        }
        return {**settings, "teacher": self.teacher.digest}

    # Checks

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        taught_by = self.teacher.check()
        self.match.check(spec, taught_by)
        self._check_vocabulary(spec)
        if self.window > taught_by.context_length:
            raise SlimError(
                f"teacher.window={self.window} exceeds the context of the teacher {taught_by.name}. "
                f"At most {taught_by.context_length}."
            )

    def _check_vocabulary(self, spec: ModelSpec) -> None:
        """Compare the teacher's vocabulary with that of the chain's beginning, where both are at
        hand."""
        if self.method == "dskd" or not has_weights(self.base):
            return
        folders = self.base.local_folder(), self.teacher.source.local_folder()
        if all(folders) and not same_vocabulary(*folders):
            raise SlimError(self.vocabulary_problem(spec.name))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return super().peak_bytes(spec, device) + self.teacher.bytes(device)

    def activation_bytes(self, spec: ModelSpec) -> int:
        logits = self.batch_tokens // self.accumulation * spec.vocab_size
        # in chunks: both logits, their softmaxes, and what the divergence keeps for its gradient
        return super().activation_bytes(spec) - 4 * 3 * logits + 4 * 8 * min(logits, CHUNK_ELEMENTS)

    def vocabulary_problem(self, student: str) -> str:
        """Say that the vocabularies differ, and what can be done."""
        return (
            f"{self.teacher.source.label} has another vocabulary than {student}, and teacher.loss={self.loss} compares them "
            "token by token. DSKD does not need the same one: use teacher=dskd (teacher.method=dskd)."
        )

    # The work

    def task(self, checkpoint: Checkpoint, device: str, precision: str):
        if self.method == "dskd":
            return dskd.DualSpaceTask(self, checkpoint, device, precision)
        if self.answers != "data":
            return on_policy.OnPolicyTask(self, checkpoint, device, precision)
        return tasks.DistillationTask(self, checkpoint, device, precision)

    def divergence(self):
        """Return the chosen divergence as a function of both log-probabilities."""
        function = getattr(losses, FUNCTIONS.get(self.loss, self.loss))
        setting = LOSSES[self.loss]
        return (
            function if setting is None else partial(function, **{setting: getattr(self, setting)})
        )


@dataclass
class Lora(Distillation, tune.Lora):
    """Distillation into low-rank adapters, merged afterwards."""

    cache_name: ClassVar[str] = "Lora"


@dataclass
class QLora(Distillation, qlora.QLora):
    """Distillation into low-rank adapters on a quantised base, merged afterwards."""

    cache_name: ClassVar[str] = "QLora"


@dataclass
class Full(Distillation, tune.Full):
    """Distillation into all weights."""

    cache_name: ClassVar[str] = "Full"


def distill(train: str = "lora", stage: str = "distill", **settings) -> Distillation:
    """Return the stage: ``train="lora"`` for adapters, ``"qlora"`` for those on a quantised base,
    ``"full"`` for all weights, which has no adapters' settings.

    stage: ``"tune"`` lets a configuration's tuner say how to train
    (``slim.chain.build.learn_from_teacher``)."""
    kinds = {"lora": Lora, "qlora": QLora, "full": Full}
    require_choice("teacher.train", train, kinds)
    require_choice("teacher.stage", stage, ("distill", "tune"))
    unused = {field.name for field in fields(QLora)} - {
        field.name for field in fields(kinds[train])
    }
    return kinds[train](**{name: value for name, value in settings.items() if name not in unused})
