"""Quantization by the original tools: settings, checks, and what their results look like. Needs no
torch; the tools themselves run in environments of their own (docs/backends.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from slim.backends.environment import Environment
from slim.backends.running import Answer
from slim.backends.stage import IsolatedStage
from slim.backends.tools import TOOLS, Tool
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.store import digest
from slim.core.errors import SlimError
from slim.core.hardware import pick_device
from slim.core.settings import require_choice, require_flag, require_number
from slim.models.spec import SIZES, ModelSpec
from slim.quantization.assign import check_groups, check_plain, layer_shapes
from slim.quantization.formats import resolve
from slim.quantization.scheme import WHOLE_ROW, Scheme
from slim.quantization.storage import packed_bits


@dataclass
class ToolQuantization(IsolatedStage):
    """Settings that all tools have.

    Attributes:
        bits: Per weight; ``allowed_bits`` of the tool.
        group_size: Weights that share a scale, or -1 for a whole row.
        symmetric: Whether the grid is symmetric around 0.
        options: Further settings of the tool, by its own names, handed over as they are.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    options: dict | None = None

    kind: ClassVar[str] = "quantize"
    tool: ClassVar[Tool]
    allowed_bits: ClassVar[tuple[int, ...]] = (4,)
    allowed_groups: ClassVar[tuple[int, ...]] = (32, 64, 128, WHOLE_ROW)
    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    form: ClassVar[str] = "awq"  # the format of its result, as far as sizes go

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("quant.bits", self.bits, self.allowed_bits)
        require_choice("quant.group_size", self.group_size, self.allowed_groups)
        require_flag("quant.symmetric", self.symmetric)
        self.options = dict(self.options or {})
        if self.needs_tokens and self.calibration is None:
            raise SlimError(
                f"quant={self.tool.name} is calibrated and needs a text: "
                "quant.calibration=${calibration}."
            )
        if not self.needs_tokens:
            self.calibration = None

    @property
    def needs_tokens(self) -> bool:
        """Whether it reads calibration tokens."""
        return True

    @property
    def input_multiple(self) -> int:
        return max(1, self.group_size)

    @property
    def title(self) -> str:
        return f"{self.tool.title} {self.tool.version}"

    @property
    def worker(self) -> Path:
        return self.tool.worker

    @property
    def on_cuda(self) -> bool:
        """Whether it works on CUDA."""
        return pick_device(self.device) == "cuda"

    def environment(self) -> Environment:
        return self.tool.environment(self.environments, self.on_cuda)

    def cache_key(self) -> dict:
        """The settings, the tool with its version, and a hash of all packages it was tried with."""
        pins = digest(list(self.tool.pins().packages))
        return {
            **super().cache_key(),
            "tool": f"{self.tool.package} {self.tool.version}",
            "pins": pins,
        }

    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "options": self.options,
        }

    def check(self, spec: ModelSpec) -> None:
        check_plain(spec)
        name = f"quant={self.tool.name}"
        if self.tool.needs_cuda and not self.on_cuda:
            raise SlimError(
                f"{name}: {self.title} quantizes on CUDA only, and there is no GPU here.\n"
                f"Use {self.tool.instead}, its successor, which runs on a CPU, or quant=gptq."
            )
        if spec.config["model_type"] not in self.families:
            raise SlimError(
                f"{name} takes models of the families {', '.join(self.families)}; {spec.name} is "
                f"{spec.config['model_type']}. Use quant=awq or quant=gptq."
            )
        if spec.differing:
            raise SlimError(
                f"{name}: blocks of {spec.name} differ in width, which no other tool reads. Use "
                "quant=awq or quant=gptq."
            )
        check_groups(spec, self.schemes(spec))

    def schemes(self, spec: ModelSpec) -> dict[str, Scheme]:
        """Return full layer name -> scheme of the result."""
        return dict.fromkeys(layer_shapes(spec), Scheme(self.bits, self.group_size, self.symmetric))

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        linears = [*layer_shapes(spec), spec.family.head]
        config = resolve(self.form).config(self.schemes(spec), linears)
        return spec.with_config(quantization_config=config)

    def result_config(self, source: Checkpoint, written: dict) -> dict:
        """The source's config, with what the tool says of the quantization and of the type: a tool
        with older libraries would leave out what these do not know."""
        described = written.get("quantization_config")
        if not isinstance(described, dict):
            raise SlimError(
                f"{self.title}: its config.json says nothing of a quantization, so nothing was "
                "quantized."
            )
        for key in SIZES:
            if written.get(key) != source.config.get(key):
                raise SlimError(
                    f"{self.title} wrote another model: {key}={written.get(key)}, not "
                    f"{source.config.get(key)}."
                )
        dtype = written.get("dtype") or written.get("torch_dtype") or source.spec.dtype
        config = {**source.config, "quantization_config": described, "dtype": dtype}
        config.pop("torch_dtype", None)
        return config

    def metadata(self, answer: Answer, environment: Environment, result: ModelSpec) -> dict:
        metadata = super().metadata(answer, environment, result)
        return {
            **metadata,
            "tool": self.title,
            "bits": self.bits,
            "bits_per_weight": round(packed_bits(result), 4),
        }


@dataclass
class AutoAWQ(ToolQuantization):
    """Settings of AutoAWQ, the implementation of AWQ (arXiv:2306.00978) that the studies used.

    Attributes:
        duo_scaling: Whether scales follow the weights as well as the inputs.
        apply_clip: Whether weights are clipped.
        parallel_samples: Samples that are computed at once; None: all, which takes most memory.
    """

    cache_name: ClassVar[str] = "AutoAWQ"

    duo_scaling: bool = True
    apply_clip: bool = True
    parallel_samples: int | None = field(default=None, metadata={"cache_key": False})

    version: ClassVar[int] = 1
    tool: ClassVar[Tool] = TOOLS["autoawq"]
    allowed_groups: ClassVar[tuple[int, ...]] = (32, 64, 128)
    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    form: ClassVar[str] = "awq"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("quant.duo_scaling", self.duo_scaling)
        require_flag("quant.apply_clip", self.apply_clip)
        if self.parallel_samples is not None:
            require_number("quant.parallel_samples", self.parallel_samples, 1, integer=True)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "duo_scaling": self.duo_scaling,
            "apply_clip": self.apply_clip,
            "parallel_samples": self.parallel_samples,
        }


@dataclass
class LLMCompressor(ToolQuantization):
    """Settings of llm-compressor, vLLM's own quantizer.

    Attributes:
        modifier: ``"gptq"``, ``"awq"``, or ``"rtn"`` for rounding to nearest, which reads no text.
    """

    cache_name: ClassVar[str] = "LLMCompressor"

    modifier: str = "gptq"

    version: ClassVar[int] = 1
    tool: ClassVar[Tool] = TOOLS["llmcompressor"]
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    families: ClassVar[tuple[str, ...]] = (
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
    )  # fmt: skip
    form: ClassVar[str] = "compressed-tensors"

    def __post_init__(self) -> None:
        require_choice("quant.modifier", self.modifier, ("gptq", "awq", "rtn"))
        super().__post_init__()

    @property
    def needs_tokens(self) -> bool:
        return self.modifier != "rtn"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "modifier": self.modifier}


@dataclass
class GptqTool(ToolQuantization):
    """Settings that implementations of GPTQ (arXiv:2210.17323) share.

    Attributes:
        desc_act: Whether columns with large inputs come first.
        damp_percent: Added to the diagonal of the Hessian, in means of it, above 0, below 1.
    """

    desc_act: bool = False
    damp_percent: float = 0.01

    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2")
    form: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("quant.desc_act", self.desc_act)
        require_number("quant.damp_percent", self.damp_percent, 1e-6, 0.999)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "desc_act": self.desc_act,
            "damp_percent": self.damp_percent,
        }


@dataclass
class AutoGPTQ(GptqTool):
    """Settings of AutoGPTQ, the implementation of GPTQ that the studies used. CUDA only."""

    cache_name: ClassVar[str] = "AutoGPTQ"
    version: ClassVar[int] = 1
    tool: ClassVar[Tool] = TOOLS["autogptq"]


@dataclass
class GPTQModel(GptqTool):
    """Settings of GPTQModel, AutoGPTQ's successor."""

    cache_name: ClassVar[str] = "GPTQModel"
    version: ClassVar[int] = 1
    tool: ClassVar[Tool] = TOOLS["gptqmodel"]
    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class AutoRound(ToolQuantization):
    """Settings of AutoRound (SignRound, arXiv:2309.05516), which learns how to round.

    Attributes:
        steps: Of signed gradient descent per block; 0 rounds to nearest.
        batch_size: Samples per step.
        format: Of its result: ``"auto_round"`` or ``"auto_gptq"``.
    """

    cache_name: ClassVar[str] = "AutoRound"

    steps: int = 200
    batch_size: int = 8
    format: str = "auto_round"

    version: ClassVar[int] = 1
    tool: ClassVar[Tool] = TOOLS["autoround"]
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    form: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("quant.steps", self.steps, 0, integer=True)
        require_number("quant.batch_size", self.batch_size, 1, integer=True)
        require_choice("quant.format", self.format, ("auto_round", "auto_gptq"))

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "format": self.format,
        }
