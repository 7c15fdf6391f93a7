"""The stage around another tool: what it is asked, and how its result becomes a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.backends.environment import Environment
from slim.backends.making import make
from slim.backends.running import Answer, run_worker
from slim.checkpoints.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.checkpoints.files import INDEX
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import copy_companions, write_blocks, write_config
from slim.core.errors import SlimError
from slim.core.io import read_object, save_tensors
from slim.core.settings import require_number
from slim.data.calibration import Calibration
from slim.models.spec import ModelSpec
from slim.quantization.storage import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

SCRATCH = ".scratch"  # within the result while it is made
LOG = "log.txt"
KEPT_BYTES = 10**7  # largest file of a tool that goes to the report
TOOL_BYTES = 10**9  # of memory that a tool's libraries and copies take, about
TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "chat_")  # the source's are kept
PICKLED = (".bin", ".pt", ".pth", ".pkl")


@dataclass
class IsolatedStage(Stage):
    """A stage that another program does, in an environment of its own (docs/backends.md).

    Attributes:
        calibration: The text whose tokens the tool is given; None: it gets none.
        seed: Of everything random in the tool.
        silence: Seconds without a sign of life after which it is stopped, 1 or more.
        device: Where it works: ``"auto"``, ``"cpu"``, ``"cuda"``.
        environments: Folder of the tools' environments.
    """

    calibration: Calibration | None = None
    seed: int = 0
    silence: float = field(default=1800.0, metadata={"cache_key": False})
    device: str = field(default="auto", metadata={"cache_key": False})
    environments: str = field(default="runs/environments", metadata={"cache_key": False})

    def __post_init__(self) -> None:
        require_number("seed", self.seed, 0, 2**32 - 1, integer=True)
        require_number("quant.silence", self.silence, 1)

    @property
    def title(self) -> str:
        """What bars and messages call it."""
        raise NotImplementedError

    @property
    def worker(self) -> Path:
        """The script that does the work."""
        raise NotImplementedError

    def environment(self) -> Environment:
        """Return the environment that the worker runs in, made or not."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what the worker is told under ``settings``, plain JSON values."""
        raise NotImplementedError

    def to_fetch(self) -> str | None:
        environment = self.environment()
        return None if environment.made else environment.plan()

    def fetch(self) -> None:
        make(self.environment())

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """The whole model, a block in float32 with its copies, the hidden states of the samples
        twice, and the tool's libraries."""
        states = 0
        if self.calibration is not None:
            length = min(self.calibration.length, spec.context_length)
            states = 2 * 4 * self.calibration.samples * length * spec.hidden_size
        return TOOL_BYTES + 2 * weight_bytes(spec) + 16 * spec.block_parameters() + states

    def run(self, source: Path, target: Path, context: Context) -> dict:
        """Let the tool work and take over what it wrote.

        Returns:
            ``tool_versions``, ``tool_seconds`` (the work alone), ``worker_seconds`` (all of it),
            ``worker_bytes`` (peak memory), ``environment``, ``notes``, and what the worker adds.
        """
        checkpoint = open_checkpoint(source)
        self.check(checkpoint.spec)
        environment = self.environment()
        make(environment)
        scratch = target / SCRATCH
        written = scratch / "result"
        written.mkdir(parents=True)
        (target / REPORT).mkdir(exist_ok=True)
        request = {
            "source": str(readable_source(checkpoint, scratch / "source")),
            "target": str(written),
            "scratch": str(scratch),
            "settings": self.settings(),
            "calibration": self._write_tokens(checkpoint, scratch),
            "device": context.device,
            "seed": self.seed,
        }
        log = target / REPORT / LOG
        try:
            answer = run_worker(environment, self.worker, request, log, self.title, self.silence)
            self.adopt(checkpoint, written, target)
        except SlimError as error:
            kept = keep_log(log, environment)
            raise SlimError(f"{error}\nThe whole log: {kept}") from error
        shutil.rmtree(scratch)
        return self.metadata(answer, environment, open_checkpoint(target).spec)

    def _write_tokens(self, checkpoint: Checkpoint, scratch: Path) -> str | None:
        """Write the tokens that slim's own methods would see, and return the file."""
        if self.calibration is None:
            return None
        tokens = self.calibration.tokens_for(checkpoint)
        file = scratch / "calibration.safetensors"
        save_tensors({"tokens": tokens}, file)
        return str(file)

    def adopt(self, source: Checkpoint, written: Path, target: Path) -> None:
        """Turn what a tool wrote into the stage's result: its weights, the source's tokenizer, a
        config that both agree on; what else it wrote goes to the report.

        Args:
            source: What it read.
            written: Folder that it wrote to.
            target: The stage's result.

        Raises:
            SlimError: It is no checkpoint that slim can read.
        """
        weights = sorted(written.glob("*.safetensors"))
        if not weights:
            pickled = [path.name for path in written.iterdir() if path.suffix in PICKLED]
            what = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
            raise SlimError(f"{self.title}: the worker wrote {what}. slim takes *.safetensors.")
        if not (written / "config.json").is_file():
            raise SlimError(f"{self.title}: the worker wrote no config.json.")
        config = self.result_config(source, read_object(written / "config.json"))
        for path in (*weights, written / INDEX):
            if path.is_file():
                path.replace(target / path.name)
        write_config(config, target)
        copy_companions(source.folder, target)
        keep_rest(written, target / REPORT, taken=("config.json", "generation_config.json"))

    def result_config(self, source: Checkpoint, written: dict) -> dict:
        """Return the result's config.

        Args:
            source: What the tool read.
            written: The config that it wrote.
        """
        return written

    def metadata(self, answer: Answer, environment: Environment, result: ModelSpec) -> dict:
        """Return what the manifest says of the work.

        Args:
            answer: What the worker said.
            environment: Where it ran.
            result: What it made.
        """
        metadata = {
            **answer.facts,
            "environment": environment.folder.name,
            "worker_seconds": answer.seconds,
        }
        if answer.peak_bytes is not None:
            metadata["worker_bytes"] = answer.peak_bytes
        if answer.notes:
            metadata["notes"] = answer.notes
        return metadata


def readable_source(checkpoint: Checkpoint, folder: Path) -> Path:
    """Give a tool a checkpoint that it reads as slim does.

    Weights are linked. The config says everything in the older spelling too: tools that are pinned
    to transformers 4 know no ``rope_parameters`` and no ``dtype``, and would go on with wrong
    angles.

    Args:
        checkpoint: The source.
        folder: Does not exist yet.

    Returns:
        ``folder``.
    """
    folder.mkdir()
    if checkpoint.is_plain:
        for path in (*checkpoint.weight_files, checkpoint.folder / INDEX):
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())
        copy_companions(checkpoint.folder, folder)
    else:  # names, types or tables that only slim reads
        write_blocks(checkpoint, folder, list(range(checkpoint.spec.blocks)))
    write_config(both_spellings(checkpoint.config), folder)
    return folder


def both_spellings(config: Mapping[str, Any]) -> dict:
    """Return a config that transformers 4 and 5 read alike.

    Args:
        config: As transformers 5 writes it, or older.
    """
    spelled = dict(config)
    rotary = config.get("rope_parameters")
    if isinstance(rotary, Mapping) and "rope_theta" in rotary:
        spelled["rope_theta"] = rotary["rope_theta"]
        if rotary.get("rope_type", "default") != "default":
            spelled["rope_scaling"] = {
                key: value for key, value in rotary.items() if key != "rope_theta"
            }
    if "dtype" in config:
        spelled["torch_dtype"] = config["dtype"]
    return spelled


def keep_rest(written: Path, report: Path, taken: Iterable[str]) -> None:
    """Move what a tool wrote besides the checkpoint to the report, where it is small.

    Args:
        written: Folder that it wrote to.
        report: Folder for people.
        taken: Names that are not needed any more.
    """
    for path in sorted(written.iterdir()):
        companion = path.name.startswith(TOKENIZER)
        if not path.is_file() or path.is_symlink() or companion or path.name in taken:
            continue
        if path.suffix not in PICKLED and path.stat().st_size <= KEPT_BYTES:
            path.replace(report / path.name)


def keep_log(log: Path, environment: Environment) -> Path:
    """Keep the log of a worker that failed next to its environment, and return where it is.

    Args:
        log: The log.
        environment: Where the worker ran.
    """
    kept = environment.root / f"{environment.name}-failed.log"
    if log.is_file():
        shutil.copyfile(log, kept)
    return kept
