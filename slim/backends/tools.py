"""The tools that slim knows: what they are, where they run, and the packages that were tried. Needs
no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slim.backends.environment import Environment, Pins, read_pins
from slim.core.errors import SlimError, did_you_mean

WORKERS = Path(__file__).parent / "workers"
SHARED_TORCH = ">=2.11,<2.14"  # slim's own range, in which the tools were tried


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        name: As in ``quant=NAME``.
        package: On the package index.
        title: As people call it.
        license: Of its code.
        modules: What is imported to see whether its environment works.
        builds: Whether it is built from source.
        needs_cuda: Whether it quantizes on CUDA only.
        instead: What to use where it cannot run.
        cuda_pins: Name of other pins for machines with CUDA; None: the same.
    """

    name: str
    package: str
    title: str
    license: str
    modules: tuple[str, ...]
    builds: bool = False
    needs_cuda: bool = False
    instead: str = ""
    cuda_pins: str | None = None

    @property
    def version(self) -> str:
        """The version that is pinned."""
        for requirement in self.pins().packages:
            name, _, number = requirement.partition("==")
            if name.lower().replace("_", "-") == self.package:
                return number
        raise ValueError(f"{self.package} is not among its own pins")

    @property
    def worker(self) -> Path:
        """The script that runs in its environment."""
        return WORKERS / f"{self.name}_worker.py"

    def pins(self, cuda: bool = False) -> Pins:
        """Return its packages.

        Args:
            cuda: Whether they are for a machine with CUDA.
        """
        return read_pins(self.cuda_pins if cuda and self.cuda_pins else self.name)

    def environment(self, root: str | Path, cuda: bool = False) -> Environment:
        """Return its environment, made or not.

        Args:
            root: Folder that holds environments.
            cuda: Whether it is for a machine with CUDA.
        """
        pins = self.pins(cuda)
        brings_torch = any(package.startswith("torch==") for package in pins.packages)
        return Environment(
            name=self.name,
            pins=pins,
            root=Path(root).expanduser().absolute(),
            torch=None if brings_torch else SHARED_TORCH,
            modules=self.modules,
            builds=self.builds,
            variables=(("BUILD_CUDA_EXT", "1" if cuda else "0"),) if self.builds else (),
        )


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("autoawq", "autoawq", "AutoAWQ", "MIT", ("awq",), builds=True),
        Tool(
            "autogptq", "auto-gptq", "AutoGPTQ", "MIT", ("auto_gptq",), needs_cuda=True,
            instead="quant=gptqmodel", cuda_pins="autogptq_cuda",
        ),
        Tool("autoround", "auto-round", "AutoRound", "Apache-2.0", ("auto_round",)),
        Tool("gptqmodel", "gptqmodel", "GPTQModel", "Apache-2.0", ("gptqmodel",), builds=True),
        Tool(
            "llmcompressor", "llmcompressor", "llm-compressor", "Apache-2.0", ("llmcompressor",)
        ),
    )
}  # fmt: skip


def find_tool(name: str) -> Tool:
    """Return a tool by its name.

    Raises:
        SlimError: There is none of that name.
    """
    if name not in TOOLS:
        raise SlimError(
            f"{name} is no tool that slim knows: {', '.join(TOOLS)}.{did_you_mean(name, TOOLS)}"
        )
    return TOOLS[name]
