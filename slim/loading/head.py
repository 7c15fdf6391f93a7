"""A head for classes on an encoder that has none: the beginning of a chain that trains a
classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.meta_model import auto_class
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import copy_companions
from slim.core.console import hide_library_bars
from slim.core.errors import SlimError
from slim.models.spec import ModelSpec
from slim.quantization.storage import weight_bytes


@dataclass
class WithHead(Stage):
    """An encoder with a new head for classes, whose weights are random; the rest is the encoder's.

    Attributes:
        base: The encoder.
        labels: Names of the classes.
        seed: Of the random weights.
    """

    cache_name: ClassVar[str] = "WithHead"

    base: object = field(default=None)
    labels: list[str] = field(default_factory=list)
    seed: int = 0

    kind: ClassVar[str] = "initialise"

    def __post_init__(self) -> None:
        if not isinstance(self.base, Source):
            raise SlimError("Only an encoder in a folder or of the hub can get a head for classes.")
        self.labels = [str(label) for label in self.labels]

    @property
    def label(self) -> str:
        """Short name for tables."""
        return f"{self.base.label} + head"

    def cache_key(self) -> dict:
        return {
            "class": self.cache_name,
            "source": self.base.content_digest(),
            "labels": self.labels,
            "seed": self.seed,
        }

    def describe(self) -> ModelSpec:
        """Describe the result by the encoder's config.

        Raises:
            SlimError: The model is no encoder, or a quantized one.
        """
        spec = self.base.describe()
        if not spec.is_encoder:
            raise SlimError(
                f"{spec.name} (model_type '{spec.config.get('model_type')}') is no encoder that "
                "slim knows, and task=classification needs one.\n"
                "Use BERT, DistilBERT, RoBERTa, XLM-R, ModernBERT or MiniLM."
            )
        spec.require_plain("Give the plain encoder, and quantize the classifier.")
        name = spec.config["architectures"][0] if spec.config.get("architectures") else ""
        for ending in ("ForMaskedLM", "ForSequenceClassification", "ForPreTraining", "Model"):
            name = name.removesuffix(ending)
        return spec.with_config(
            architectures=[f"{name or self._class_prefix(spec)}ForSequenceClassification"],
            id2label={str(number): label for number, label in enumerate(self.labels)},
            label2id={label: number for number, label in enumerate(self.labels)},
        )

    @staticmethod
    def _class_prefix(spec: ModelSpec) -> str:
        """What the family's classes begin with, where the config does not say it."""
        prefixes = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta"}
        prefixes |= {"xlm-roberta": "XLMRoberta", "modernbert": "ModernBert"}
        return prefixes[spec.config["model_type"]]

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return 2 * weight_bytes(spec)

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Write the encoder with its head.

        Args:
            source: None: nothing comes before it.
            target: An empty folder.
            context: Not needed.

        Returns:
            ``classes``: their names.
        """
        import torch

        hide_library_bars()
        checkpoint = self.base.resolve()
        spec = self.describe()
        torch.manual_seed(self.seed)
        model, info = auto_class(spec).from_pretrained(
            checkpoint.folder,
            id2label=dict(enumerate(self.labels)),
            label2id=spec.config["label2id"],
            dtype=getattr(torch, spec.dtype),
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        self._require_body(info["missing_keys"], spec, checkpoint)
        model.save_pretrained(target)
        copy_companions(checkpoint.folder, target)
        open_checkpoint(target)
        return {"classes": self.labels}

    def _require_body(self, missing, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        """Raise ``SlimError`` where more than the head is missing in the files."""
        family = spec.family
        for name in sorted(missing):
            if name.startswith((f"{family.blocks}.", f"{family.embedding_module}.")):
                raise SlimError(
                    f"{checkpoint.folder} has no tensor '{name}', which its config asks for."
                )


def lacks_head(spec: ModelSpec, labels: list[str]) -> bool:
    """Whether an encoder needs a new head to tell some classes apart.

    Args:
        spec: The encoder.
        labels: Names of the classes.
    """
    return spec.top != "classification" or not set(labels) <= set(spec.labels)
