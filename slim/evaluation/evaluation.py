"""An evaluation: what is measured on a checkpoint, and the protocol that makes the figures comparable.

Quality (perplexity, tasks, sample generations) is a fact about a checkpoint; speed and memory are facts about a
checkpoint on a machine. So they have identities of their own, under which a pipeline keeps their results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoint import resolve_dtype
from slim.data.text import Text
from slim.errors import SlimError
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.speed import Speed
from slim.evaluation.tasks import Tasks
from slim.machine import fingerprint
from slim.settings import identity, require_choice, require_number

if TYPE_CHECKING:
    from slim.architecture import ModelDescription

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_RULES = {"auto": "float32 on a CPU, the stored type elsewhere"}


@dataclass
class Evaluation:
    """The parts of an evaluation; a part that is None is left out.

    prompts: texts that the model continues greedily, by up to ``new_tokens`` tokens each; shown as sample generations.
    dtype: type to compute in: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU (bfloat16 where
        the speed of 4-bit weights is measured), the stored
        type elsewhere.
    """

    perplexity: Perplexity | None = None
    tasks: Tasks | None = None
    speed: Speed | None = None
    prompts: list[str] = field(default_factory=list)
    new_tokens: int = 48
    dtype: str = "auto"

    # Raised whenever the same settings begin to give different figures, so that kept results are not reused.
    quality_version: ClassVar[int] = 1
    speed_version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.prompts = list(self.prompts or [])
        if not all(isinstance(prompt, str) and prompt for prompt in self.prompts):
            raise SlimError("eval.prompts takes texts that are not empty, for example eval.prompts=['The town of'].")
        require_number("eval.new_tokens", self.new_tokens, 1, integer=True)
        require_choice("eval.dtype", self.dtype, DTYPES)

    @property
    def has_quality(self) -> bool:
        """Whether anything is measured that is a fact about the checkpoint alone."""
        return bool(self.perplexity or (self.tasks and self.tasks.names) or self.prompts)

    @property
    def has_speed(self) -> bool:
        """Whether speed and memory are measured."""
        return self.speed is not None

    def quality_dtype(self, model: ModelDescription, device: str) -> str:
        """Return the type quality is measured in, such as ``"float32"``."""
        return resolve_dtype(model, self.dtype, device)

    def speed_dtype(self, model: ModelDescription, device: str) -> str:
        """Return the type speed and memory are measured in: with ``dtype="auto"`` the fastest one for the checkpoint.

        On a CPU that is float32, but bfloat16 for weights of 4 bits: torch's int4 kernel and that of bitsandbytes take no
        other.
        """
        from slim.quantization.bnb import is_bitsandbytes

        if self.dtype == "auto" and device == "cpu" and model.quantization is not None:
            blocks = model.family.blocks + "."
            if is_bitsandbytes(model.quantization):
                widths = {4 if model.quantization.get("load_in_4bit") else 8}
            else:
                widths = {scheme.bits for layer, scheme in model.packed_schemes().items() if layer.startswith(blocks)}
            if widths == {4}:
                return "bfloat16"
        return self.quality_dtype(model, device)

    def check(self, model: ModelDescription) -> None:
        """Raise ``SlimError`` for what cannot work on ``model``. Reads no weights and takes well under a second."""
        if self.tasks:
            self.tasks.check()
        if self.speed:
            self.speed.check(model)
        if self.prompts and self.new_tokens >= model.context_length:
            raise SlimError(
                f"eval.new_tokens={self.new_tokens} leaves no room for a prompt in the context of "
                f"{model.context_length} tokens of {model.name}. Take fewer."
            )

    def quality_identity(self) -> dict:
        """Return what determines perplexity, accuracies and sample generations, as plain JSON values."""
        return {
            "version": self.quality_version,
            "dtype": DTYPE_RULES.get(self.dtype, self.dtype),
            "perplexity": identity(self.perplexity),
            "tasks": identity(self.tasks) if self.tasks and self.tasks.names else None,
            "prompts": self.prompts,
            "new_tokens": self.new_tokens if self.prompts else None,
        }

    def speed_identity(self) -> dict:
        """Return what determines speed and memory on a given machine, as plain JSON values."""
        own_prompts = self.speed is None or self.speed.prompts
        return {
            "version": self.speed_version,
            "dtype": DTYPE_RULES.get(self.dtype, self.dtype),
            "speed": identity(self.speed),
            "text": None if own_prompts else self._speed_text().text_identity(),
        }

    def measure_quality(self, model, tokenizer) -> dict:
        """Return ``metrics`` (flat name -> float), ``protocol`` per part, ``samples`` (``prompt``, ``answer``)."""
        from slim.evaluation.generation import samples

        context_length = model.config.max_position_embeddings
        metrics: dict[str, float] = {}
        protocol: dict = {"dtype": dtype_name(model)}
        parts = {"perplexity": self.perplexity, "tasks": self.tasks if self.tasks and self.tasks.names else None}
        for name, part in parts.items():
            if part is not None:
                found = part.measure(model, tokenizer, context_length)
                metrics.update(found["metrics"])
                protocol[name] = found["protocol"]
        answers = samples(model, tokenizer, self.prompts, self.new_tokens) if self.prompts else []
        return {"metrics": metrics, "protocol": protocol, "samples": answers}

    def speed_prompts(self, tokenizer) -> list[list[int]]:
        """Return the tokens of the prompts that :meth:`measure_speed` times."""
        return self.speed.prompt_ids(tokenizer, self._speed_text())

    def measure_speed(self, model, prompts: list[list[int]]) -> dict:
        """Return ``metrics``: rates and the bytes of the weights in memory; ``protocol``; and no ``samples``."""
        from slim.evaluation.memory import weights_bytes

        found = self.speed.measure(model, prompts)
        metrics = {**found["metrics"], "weights_bytes": float(weights_bytes(model))}
        protocol = {"dtype": dtype_name(model), **found["protocol"], "machine": fingerprint(model.device.type)}
        return {"metrics": metrics, "protocol": {"speed": protocol}, "samples": []}

    def _speed_text(self) -> Text:
        """The text that prompts for timing are cut from: the one of the perplexity, else the embedded one."""
        return self.perplexity or Text("tiny:heldout")


def dtype_name(model) -> str:
    """Return the type a torch model computes in, such as ``"float32"``."""
    return str(model.dtype).removeprefix("torch.")
