"""Distillation as a stage: a checkpoint is trained on what a teacher says, by adapters or in all
its weights.

The training itself (data, steps, adapters, merging, best state) is that of ``slim.training.tune``;
what is minimised is in ``objective.py``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.source import has_weights
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import dataclass_cache_key, require_choice, require_number
from slim.data.scored import Scored
from slim.distillation import CHUNK_ELEMENTS
from slim.distillation.layer_map import Matching
from slim.distillation.losses import LOSSES
from slim.distillation.questions import ANSWERS, Generation
from slim.distillation.teacher import BASE, DTYPES, QUANTS, Teacher, same_vocabulary
from slim.models.encoders import CLASSES
from slim.training import qlora, scales, tune

if TYPE_CHECKING:
    from slim.checkpoints.checkpoint import Checkpoint
    from slim.distillation import classes, dskd, on_policy, plan, tasks
    from slim.models.spec import ModelSpec
else:
    classes, dskd, on_policy, plan, tasks = (
        LazyModule(f"slim.distillation.{name}")
        for name in ("classes", "dskd", "on_policy", "plan", "tasks")
    )

METHODS = ("token", "dskd")
ALIGNMENTS = ("exact", "attention")
LOSS_FIELDS = ("beta", "skew", "head")  # settings of losses that are typed as teacher.NAME
CHOSEN_ONLY = {"cache_key": False}  # in the cache key by the teacher's content


@dataclass
class Distillation(tune.Tuner):
    """What to learn from whom; how to train is in :class:`slim.training.tune.Tuner`.

    Attributes:
        base: Where the chain begins.
        model: ``base`` for that as the teacher, or a checkpoint folder or hub id.
        revision: Of a hub model.
        dtype: Of the teacher's weights.
        method: ``token`` compares distributions token by token, ``dskd`` in both models' spaces,
            whatever the tokenizers.
        align: With different tokenizers, ``exact`` compares tokens before which both models have
            read the same text, ``attention`` lets each token of one attend to all of the other's.
        projector_rate: Highest learning rate of projectors between both models; None takes that of
            full training.
        loss: A name in ``losses.py``.
        temperature: Both distributions are softened by it, 0.01 to 100.
        hard_weight: Weight of the hard labels, 0 to 1; the teacher has the rest.
        beta: Setting of ``loss="symmetric"``.
        skew: Setting of the two skewed losses.
        head: Setting of ``loss="adaptive"``.
        loss_settings: The setting of a loss that has no field of its own here, by its name.
        quant: ``nf4`` or ``int8`` quantises the teacher.
        cache: Keep the teacher's most likely tokens in ``cache_folder``, or, where this is a path,
            in that folder.
        top_k: How many tokens of each position are kept.
        cache_folder: Where caches without a folder of their own are kept.
        match: Further losses on hidden states and attention maps.
        answers: Whose answers to learn on: ``data``, ``teacher``, ``student``, ``both``.
        generation: How answers are made.
    """

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
    loss_settings: dict[str, float] | None = field(default=None, metadata=CHOSEN_ONLY)
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
                "teacher.model is missing. "
                "Give base (the model the chain begins with), a folder or a hub id."
            )
        require_choice("teacher.dtype", self.dtype, DTYPES)
        require_number("teacher.temperature", self.temperature, 0.01, 100)
        require_number("teacher.hard_weight", self.hard_weight, 0, 1)
        require_number("teacher.top_k", self.top_k, 1, integer=True)
        require_choice("teacher.quant", self.quant, QUANTS)
        self._check_loss()
        self._check_combination()
        self._check_answers()
        if self.projector_rate is not None:
            require_number("teacher.projector_rate", self.projector_rate, 1e-9, 1)
        self.teacher = Teacher(self.base, self.model, self.revision, self.dtype, self.quant)

    def _check_loss(self) -> None:
        require_choice("teacher.loss", self.loss, LOSSES)
        for loss in LOSSES.values():
            if loss.setting in LOSS_FIELDS:
                value = getattr(self, loss.setting)
                require_number(f"teacher.{loss.setting}", value, loss.low, loss.high)
        chosen = LOSSES[self.loss]
        self.loss_settings = dict(self.loss_settings or {})
        for name, value in self.loss_settings.items():
            if name != chosen.setting or name in LOSS_FIELDS:
                raise SlimError(
                    f"teacher.loss_settings: teacher.loss={self.loss} has no setting '{name}' "
                    "there. Leave it out."
                )
            require_number(f"teacher.loss_settings.{name}", value, chosen.low, chosen.high)

    @property
    def loss_setting(self) -> float | None:
        """Value of the chosen loss's setting; None where it has none."""
        chosen = LOSSES[self.loss]
        if chosen.setting in LOSS_FIELDS:
            return getattr(self, chosen.setting)
        return self.loss_settings.get(chosen.setting, chosen.default)

    def _check_combination(self) -> None:
        require_choice("teacher.method", self.method, METHODS)
        require_choice("teacher.align", self.align, ALIGNMENTS)
        require_choice("teacher.answers", self.answers, ANSWERS)
        if self.method == "dskd" and (self.cache or self.match.wanted or self.answers != "data"):
            raise SlimError(
                "teacher.method=dskd works without teacher.cache, teacher.match and made answers: "
                "leave them out."
            )
        if self.cache and self.match.wanted:
            raise SlimError(
                "teacher.cache keeps probabilities only, and teacher.match needs the teacher's "
                "hidden states.\nUse teacher.cache=false, or teacher.match.hidden=0 "
                "teacher.match.attention=0."
            )

    def _check_answers(self) -> None:
        if self.answers == "data":
            return
        self.generation.check(self.window, self.accumulation)
        if self.cache:
            raise SlimError(
                f"teacher.answers={self.answers} makes new answers in every step: "
                "set teacher.cache=false."
            )
        if self.hard_weight and self.answers != "teacher":
            raise SlimError(
                f"teacher.answers={self.answers} has no right answers to learn by heart: "
                "set teacher.hard_weight=0 (as teacher=on_policy does)."
            )

    def cache_key(self) -> dict:
        key = dataclass_cache_key(self)
        # A result is named by what it depends on: settings that are not used are left out.
        chosen = LOSSES[self.loss].setting
        for name in LOSS_FIELDS:
            if name != chosen:
                key.pop(name)
        if chosen is not None and chosen not in LOSS_FIELDS:
            key["loss_settings"] = {chosen: self.loss_setting}
        if self.method != "dskd":
            key.pop("align")
        if self.answers == "data":
            key.pop("generation")
        if not self.match.wanted:
            key.pop("match")
        if not self.cache:  # top_k is the only trace that a cache leaves in the result
            key.pop("top_k")
        return {**key, "teacher": self.teacher.digest}

    # Checks

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        teacher = self.teacher.check()
        self.match.check(spec, teacher)
        self._check_vocabulary(spec)
        self._check_encoders(spec, teacher)
        if self.window > teacher.context_length:
            raise SlimError(
                f"teacher.window={self.window} exceeds the context of the teacher {teacher.name}. "
                f"Use at most {teacher.context_length}."
            )

    def _check_encoders(self, spec: ModelSpec, teacher: ModelSpec) -> None:
        """Check that an encoder learns from one, and in a way that it can."""
        if spec.is_encoder != teacher.is_encoder:
            raise SlimError(
                f"teacher.model: an encoder learns from an encoder, and a decoder from a decoder; "
                f"{spec.name} and {teacher.name} are one of each."
            )
        if not spec.is_encoder:
            return
        if isinstance(self.data, Scored):
            raise SlimError(
                "teacher=...: classifiers learn from a teacher; bi-encoders and cross-encoders "
                "learn from pairs with scores alone.\nTrain the student on them: tuner=encoder."
            )
        if teacher.top != CLASSES or set(teacher.labels) != set(spec.labels):
            raise SlimError(
                f"teacher.model: {teacher.name} must be a classifier of the classes "
                f"{', '.join(spec.labels)}.\nTrain it first: train.py task=classification "
                "model=... output=FOLDER"
            )
        if self.method != "token" or self.cache or self.answers != "data":
            raise SlimError(
                "An encoder learns a teacher's classes and hidden states: leave teacher.method, "
                "teacher.cache and teacher.answers as they are (teacher=encoder)."
            )

    def _check_vocabulary(self, spec: ModelSpec) -> None:
        """Compare the teacher's vocabulary with that of the chain's beginning, where both are at
        hand."""
        if self.method == "dskd" or not has_weights(self.base):
            return
        folders = self.base.local_folder(), self.teacher.source.local_folder()
        if all(folders) and not same_vocabulary(*folders):
            raise SlimError(self.teacher.vocabulary_problem(spec.name, self.loss))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return super().peak_bytes(spec, device) + self.teacher.bytes(device)

    def activation_bytes(self, spec: ModelSpec) -> int:
        logits = self.batch_tokens // self.accumulation * spec.vocab_size
        # In chunks: both logits, their softmaxes, and what the divergence keeps for its gradient.
        return super().activation_bytes(spec) - 4 * 3 * logits + 4 * 8 * min(logits, CHUNK_ELEMENTS)

    # The work

    def task(self, checkpoint: Checkpoint, device: str, precision: str):
        if checkpoint.spec.is_encoder:
            kind = classes.ClassDistillationTask
        elif self.method == "dskd":
            kind = dskd.DualSpaceTask
        elif self.answers != "data":
            kind = on_policy.OnPolicyTask
        else:
            kind = tasks.DistillationTask
        return kind(self.task_plan(checkpoint.spec), checkpoint, device, precision)

    def task_plan(self, spec: ModelSpec) -> plan.DistillationPlan:
        """Return what the task needs to know.

        Args:
            spec: The student.
        """
        # Projectors are matrices that are trained in full, whatever of the student is.
        projector_rate = self.projector_rate or tune.Full.width_rate / spec.hidden_size
        return plan.DistillationPlan(
            **self.task_settings(),
            teacher=self.teacher,
            loss=self.loss,
            divergence=LOSSES[self.loss].divergence(self.loss_setting),
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            projector_rate=projector_rate,
            match=self.match,
            cache=self.cache,
            cache_folder=self.cache_folder,
            top_k=self.top_k,
            align=self.align,
            answers=self.answers,
            generation=self.generation,
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


@dataclass
class Scales(Distillation, scales.Scales):
    """Distillation into the scales of a quantised model."""

    cache_name: ClassVar[str] = "Scales"


def distill(train: str = "lora", stage: str = "distill", **settings) -> Distillation:
    """Return the stage.

    Args:
        train: ``lora`` for adapters, ``qlora`` for those on a quantised base, ``full`` for all
            weights and ``scales`` for those of a quantised model, which have no adapters' settings.
        stage: ``tune`` lets a configuration's tuner say how to train
            (``slim.chain.build.learn_from_teacher``).
        **settings: Fields of :class:`Lora`, :class:`QLora`, :class:`Full` or :class:`Scales`; those
            that only the others have are left out.

    Raises:
        SlimError: ``train`` or ``stage`` is none of these, or a setting is wrong.
    """
    kinds = {"lora": Lora, "qlora": QLora, "full": Full, "scales": Scales}
    require_choice("teacher.train", train, kinds)
    require_choice("teacher.stage", stage, ("distill", "tune"))
    has = {setting.name for setting in fields(kinds[train])}
    unused = {setting.name for setting in fields(QLora)} - has
    return kinds[train](**{name: value for name, value in settings.items() if name not in unused})
