"""An evaluation: what is measured on a checkpoint, and the protocol that makes the figures
comparable.

Quality (perplexity, tasks, sample generations) is a fact about a checkpoint; speed and memory are
facts about a checkpoint on a machine. So they have identities of their own, under which a pipeline
keeps their results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from slim.core.console import say
from slim.core.errors import SlimError
from slim.core.hardware import fingerprint
from slim.core.settings import cache_key, require_choice, require_flag, require_number
from slim.data.text import Text
from slim.evaluation.answers import Answers
from slim.evaluation.documents import DocumentPerplexity
from slim.evaluation.energy import check_country, generation_energy
from slim.evaluation.engines.find import find_engine
from slim.evaluation.generation import samples
from slim.evaluation.health import finite, first_non_finite, repetition, suspects
from slim.evaluation.judge import Judge
from slim.evaluation.memory import phase_peaks, weights_bytes
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.speed import Speed, preset
from slim.evaluation.tasks import Tasks
from slim.models.spec import resolve_dtype
from slim.quantization.storage import packed_schemes

if TYPE_CHECKING:
    from slim.evaluation.divergence import KeptReference, Reference
    from slim.evaluation.engines.engine import Engine
    from slim.models.spec import ModelSpec

ENGINES = ("llama_cpp", "vllm")
# parts that engines have no share in
SLIMS_OWN = ("tasks", "documents", "answers", "judge", "energy", "kl")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# "auto" in a cache key as what it means: a change of the rule must change the key
DTYPE_RULES = {"auto": "float32 on a CPU, the stored type elsewhere"}


@dataclass
class Evaluation:
    """The parts of an evaluation; a part that is None is left out.

    Attributes:
        perplexity: per token.
        tasks: accuracies on multiple-choice questions.
        speed: rates and memory; also the name of a preset.
        prompts: texts that the model continues greedily; shown as sample generations.
        new_tokens: most tokens of each continuation.
        dtype: type to compute in: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``:
            float32 on a CPU (speed in the type that is faster on this machine), the stored type
            elsewhere.
        documents: perplexity per word and byte.
        answers: to questions with a reference.
        judge: compares the answers of every checkpoint with those of the first one.
        energy: country whose electricity the machine uses, three letters, to measure energy and
            CO2; None measures none.
        local_data: folder with the questions of stock tasks (see :class:`Tasks`).
        kl: whether the predictions of every checkpoint are compared with those of the first one, on
            the text of the perplexity (see :mod:`slim.evaluation.divergence`).
        engine: another engine that measures instead of slim: ``"llama_cpp"`` or ``"vllm"``. It
            gives perplexity, speed, memory and sample generations; other parts are left out. None:
            slim.
        engine_path: where the engine is; None: it is looked for (see ``slim/evaluation/engines``).
        extra: further parts by name: objects with ``measure(model, tokenizer, context_length)``
            (docs/extending/metric.md).
    """

    perplexity: Perplexity | None = None
    tasks: Tasks | None = None
    speed: Speed | None = None
    prompts: list[str] = field(default_factory=list)
    new_tokens: int = 48
    dtype: str = "auto"
    documents: DocumentPerplexity | None = None
    answers: Answers | None = None
    judge: Judge | None = None
    energy: str | None = None
    local_data: str | None = None
    kl: bool = False
    engine: str | None = None
    engine_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    # found by slim.evaluation.machine.machine_dtype, and set where there is a store to keep it in
    machine_dtype: str | None = field(default=None, init=False, repr=False)
    # the first checkpoint, set by who measures several; without one nothing is compared
    reference: Reference | None = field(default=None, init=False, repr=False)
    # looked for once
    _engine: Engine | None = field(default=None, init=False, repr=False, compare=False)
    _left_out: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    # Raised whenever the same settings begin to give different figures, so that kept results are
    # not reused.
    quality_version: ClassVar[int] = 2
    speed_version: ClassVar[int] = 3
    kl_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.prompts = list(self.prompts or [])
        if isinstance(self.speed, str):
            self.speed = preset(self.speed)
        if self.local_data is not None and self.tasks is not None:
            # the setting stands next to the tasks' names, since it concerns what data they read
            self.tasks.local_data = str(self.local_data)
        for name in ("perplexity", "documents"):  # as their settings are typed, for messages
            if getattr(self, name) is not None:
                getattr(self, name).group = f"eval.{name}"
        if self.judge is not None and self.answers is None:
            raise SlimError(
                "eval.judge compares answers: it needs eval.answers too (eval=judged has both)."
            )
        require_flag("eval.kl", self.kl)
        if self.kl and self.perplexity is None:
            raise SlimError(
                "eval.kl=true compares predictions on the text of eval.perplexity, which is null. "
                "Use another eval, such as eval=wikitext2, or eval.kl=false."
            )
        for prompt in self.prompts:
            if not isinstance(prompt, str) or not prompt:
                raise SlimError(
                    "eval.prompts takes texts that are not empty, for example "
                    "eval.prompts=['The town of']."
                )
        require_number("eval.new_tokens", self.new_tokens, 1, integer=True)
        require_choice("eval.dtype", self.dtype, DTYPES)
        if self.engine is not None:
            require_choice("eval.engine", self.engine, ENGINES)
            self._check_engine()
        elif self.engine_path is not None:
            raise SlimError(
                "eval.engine_path needs the engine's name: eval.engine=llama_cpp or "
                "eval.engine=vllm."
            )

    def _check_engine(self) -> None:
        """Leave out what an engine does not measure; refuse what it cannot time."""
        self._left_out = [part for part in SLIMS_OWN if getattr(self, part)]
        self._left_out += list(self.extra)
        for part in SLIMS_OWN:
            setattr(self, part, None)
        self.extra = {}
        self.kl = False
        speed = self.speed
        if speed is None:
            return
        if speed.batch_size != [1] or len(speed.prompt_length) > 1:
            raise SlimError(
                "eval.engine times one prompt at a time: give one eval.speed.prompt_length and "
                "eval.speed.batch_size=1."
            )
        if speed.compile:
            raise SlimError("eval.speed.compile=true compiles slim's own model: leave it out.")

    def installed_engine(self) -> Engine:
        """Return the engine that measures. Raises ``SlimError`` where it is missing or too old."""
        if self._engine is None:
            self._engine = find_engine(self.engine, self.engine_path)
            if self._left_out:
                say(f"{self._engine.label} does not measure {', '.join(self._left_out)}.")
        return self._engine

    @property
    def has_quality(self) -> bool:
        """Whether anything is measured that is a fact about the checkpoint alone."""
        return bool(self._quality_parts() or self.prompts)

    def _quality_parts(self) -> dict:
        """Return name -> part of what is a fact about the checkpoint alone."""
        # eval.tasks.names=[] leaves the tasks out, as eval.tasks=null does
        tasks = self.tasks
        if tasks is not None and not tasks.names:
            tasks = None
        parts = {
            "perplexity": self.perplexity,
            "documents": self.documents,
            "tasks": tasks,
            "answers": self.answers,
            **self.extra,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def has_speed(self) -> bool:
        """Whether speed and memory are measured."""
        return self.speed is not None

    def quality_dtype(self, spec: ModelSpec, device: str) -> str:
        """Return the type quality is measured in.

        Args:
            spec: the checkpoint.
            device: ``"cpu"`` or ``"cuda"``.

        Returns:
            Its name, such as ``"float32"``.
        """
        return resolve_dtype(spec, self.dtype, device)

    def speed_dtype(self, spec: ModelSpec, device: str) -> str:
        """Return the type speed and memory are measured in.

        Args:
            spec: the checkpoint.
            device: ``"cpu"`` or ``"cuda"``.

        Returns:
            With ``dtype="auto"`` on a CPU ``machine_dtype``, the same for all checkpoints; where
            that was not measured, float32, and bfloat16 for weights of 4 bits, whose kernels take
            no other. Else the type of quality.
        """
        if self.dtype != "auto" or device != "cpu" or self.engine is not None:
            return self.quality_dtype(spec, device)
        if self.machine_dtype is not None:
            return self.machine_dtype
        if _all_blocks_in_4_bits(spec):
            return "bfloat16"
        return self.quality_dtype(spec, device)

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for what cannot work on ``spec``. Reads no weights and takes well
        under a second."""
        if self.engine is not None:
            self.installed_engine().check(spec)
        if spec.is_encoder:
            self._refuse_generation(spec)
        for part in self.extra.values():
            if hasattr(part, "check"):
                part.check(spec)
        if self.tasks:
            self.tasks.check()
        if self.speed:
            self.speed.check(spec)
        if self.answers:
            self.answers.check(spec)
        if self.energy is not None:
            check_country(self.energy)
        if self.prompts and self.new_tokens >= spec.context_length:
            raise SlimError(
                f"eval.new_tokens={self.new_tokens} leaves no room for a prompt in the context of "
                f"{spec.context_length} tokens of {spec.name}. Use fewer."
            )

    def _refuse_generation(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for parts that need a model which continues texts."""
        parts = {
            **self._quality_parts(),
            "prompts": self.prompts,
            "kl": self.kl,
            "energy": self.energy,
            "engine": self.engine,
            "speed": self.speed if not hasattr(self.speed, "encodes") else None,
        }
        for name, part in parts.items():
            if part and name not in self.extra:
                raise SlimError(
                    f"eval.{name} needs a model that continues texts, and {spec.name} is an "
                    "encoder.\nUse task=classification or task=similarity, which choose what is "
                    "measured, or eval=none."
                )

    def quality_cache_key(self) -> dict:
        """Return what determines perplexity, accuracies and sample generations, as plain JSON
        values."""
        key: dict = {
            "version": self.quality_version,
            "dtype": DTYPE_RULES.get(self.dtype, self.dtype),
        }
        for name, part in self._quality_parts().items():
            key[name] = cache_key(part)
        key["prompts"] = self.prompts
        # without prompts their length changes nothing
        key["new_tokens"] = self.new_tokens if self.prompts else None
        if self.kl and self.reference is not None:
            key["kl"] = {"version": self.kl_version, "reference": self.reference.content}
        if self.engine is not None:
            key["engine"] = self.installed_engine().label
        return key

    def speed_cache_key(self) -> dict:
        """Return what determines speed and memory on a given machine, as plain JSON values."""
        key = {
            "version": self.speed_version,
            "dtype": DTYPE_RULES.get(self.dtype, self.dtype),
            "speed": cache_key(self.speed),
            "energy": self.energy,
            "text": None,
        }
        # texts that are given are part of "speed"
        if self.speed is not None and not self.speed.prompts:
            key["text"] = self._speed_text().text_identity()
        if self.engine is not None:
            key["engine"] = self.installed_engine().label
        return key

    def measure_quality(self, model, tokenizer, kept: KeptReference | None = None) -> dict:
        """Measure what is a fact about the checkpoint alone.

        Args:
            model: a torch module of transformers.
            tokenizer: of the checkpoint.
            kept: what is kept of ``reference``; None: nothing is compared with it.

        Returns:
            ``metrics``: name -> float; ``protocol``: per part what they depend on; ``samples``:
            ``prompt`` and ``answer`` of each; ``records``: per part what was measured question by
            question; ``health``: where NaN or infinity starts (empty if all is finite).
        """
        context_length = model.config.max_position_embeddings
        metrics: dict[str, float] = {}
        protocol: dict = {"dtype": dtype_name(model)}
        measured = {}
        records = {}
        for name, part in self._quality_parts().items():
            if name == "perplexity" and kept is not None:
                # in the same pass over the text
                result = part.measure(model, tokenizer, context_length, kept)
                protocol["kl"] = {**result["protocol"], "reference": self.reference.content}
            else:
                result = part.measure(model, tokenizer, context_length)
            metrics.update(result["metrics"])
            protocol[name] = result["protocol"]
            records[name] = result["records"]
            measured[name] = result
        continued = samples(model, tokenizer, self.prompts, self.new_tokens)
        answers = records.get("answers", [])
        # all that the model wrote: one that repeats itself does so in either
        texts = [row["answer"] for row in continued + answers]
        metrics.update(repetition(tokenizer, texts))
        protocol["generation"] = {
            "prompts": len(continued),
            "new_tokens": self.new_tokens,
            "answers": len(answers),
        }
        health = self._health(model, tokenizer, metrics, measured, context_length)
        return {
            "metrics": metrics,
            "protocol": protocol,
            "samples": continued,
            "records": records,
            "health": health,
        }

    def _health(self, model, tokenizer, metrics: dict, measured: dict, context_length: int) -> dict:
        """Return ``{"non_finite": ...}`` (see :func:`first_non_finite`) where a metric is not
        finite, else nothing."""
        if finite(metrics):
            return {}
        # the windows come first: their records say which of them is not finite
        windows = []
        if self.perplexity:
            windows = self.perplexity.windows(tokenizer, context_length).tolist()
        return {"non_finite": first_non_finite(model, suspects(tokenizer, measured, windows))}

    def check_tokenizer(self, tokenizer, context_length: int) -> None:
        """Raise ``SlimError`` for what the checkpoint's tokenizer cannot do, and for prompts that
        are too long, before weights are loaded.

        Args:
            tokenizer: of the checkpoint.
            context_length: tokens that it has room for.
        """
        if self.answers is not None:
            self.answers.check_tokenizer(tokenizer)
        require_room("eval.prompts", self.prompts, tokenizer, self.new_tokens, context_length)
        if self.speed is not None and self.speed.max_length is None:
            texts, following = self.speed.prompts, self.speed.new_tokens
            require_room("eval.speed.prompts", texts, tokenizer, following, context_length)

    def speed_prompts(self, tokenizer) -> list[list[int]]:
        """Return the tokens of the prompts that :meth:`measure_speed` times."""
        return self.speed.prompt_ids(tokenizer, self._speed_text())

    def measure_speed(self, model, prompts: list[list[int]]) -> dict:
        """Measure speed, which is a fact about a checkpoint on this machine.

        Args:
            model: a torch module of transformers.
            prompts: tokens of each prompt, from :meth:`speed_prompts`.

        Returns:
            ``metrics``: rates, and the bytes of the weights in memory; ``protocol``: what they
            depend on, the machine included; ``samples``: empty.
        """
        timed = self.speed.measure(model, prompts)
        metrics = {**timed["metrics"], "weights_bytes": float(weights_bytes(model))}
        protocol = {
            "dtype": dtype_name(model),
            **timed["protocol"],
            "machine": fingerprint(model.device.type),
        }
        return {"metrics": metrics, "protocol": {"speed": protocol}, "samples": []}

    def measure_use(self, model, prompts: list[list[int]]) -> dict[str, float]:
        """Measure what generating takes besides time.

        Args:
            model: a torch module of transformers.
            prompts: tokens of each prompt, from :meth:`speed_prompts`.

        Returns:
            Memory of each phase (see :func:`slim.evaluation.memory.phase_peaks`), and energy where
            it is asked for (see :func:`slim.evaluation.energy.generation_energy`).
        """
        if hasattr(self.speed, "measure_use"):
            return self.speed.measure_use(model, prompts)
        _, cut = self.speed.cases(prompts)[""]  # the case in tables
        new_tokens = self.speed.new_after(cut[0])
        metrics = phase_peaks(model, cut[0], new_tokens)
        if self.energy is not None:
            metrics.update(generation_energy(model, cut, new_tokens, self.energy))
        return metrics

    def _speed_text(self) -> Text:
        """The text that prompts for timing are cut from: the one of the perplexity, else the
        embedded one."""
        return self.perplexity or Text("tiny:heldout")


def _all_blocks_in_4_bits(spec: ModelSpec) -> bool:
    """Whether every quantised layer of the blocks has 4 bits; False where there is none."""
    if spec.quantization is None:
        return False
    blocks = spec.family.blocks + "."
    # the head and the embedding may be wider: they are a small share of the time
    widths = set()
    for layer, scheme in packed_schemes(spec).items():
        if layer.startswith(blocks):
            widths.add(scheme.bits)
    return widths == {4}


def require_room(
    setting: str, prompts: list[str], tokenizer, new_tokens: int, context_length: int
) -> None:
    """Raise ``SlimError`` for a prompt without tokens, or one that does not fit into the context
    together with its answer.

    Args:
        setting: where the prompts come from, for the message.
        prompts: texts.
        tokenizer: of the checkpoint.
        new_tokens: tokens of an answer.
        context_length: tokens that the model has room for.
    """
    for number, prompt in enumerate(prompts):
        length = len(tokenizer(prompt)["input_ids"])
        if length == 0:
            raise SlimError(f"{setting}[{number}] has no tokens. Give a text, or leave it out.")
        if length + new_tokens > context_length:
            raise SlimError(
                f"{setting}[{number}] has {length} tokens, and with {new_tokens} new ones exceeds "
                f"the context of {context_length}. Shorten it, or generate fewer."
            )


def dtype_name(model) -> str:
    """Return the type a torch model computes in, such as ``"float32"``."""
    return str(model.dtype).removeprefix("torch.")
