"""Width pruning: attention heads and MLP channels are removed. What its criteria share: settings,
counts, report.

Whole key/value groups go, each a key/value head with the query heads that read it, and MLP
channels, coupled over q/k/v/o and gate/up/down, so that every matrix only becomes smaller. Criteria
give every unit of a block a score (``width_magnitude.py``, ``width_taylor.py``,
``width_activation.py``); the units of a block compete with one another. Ma et al., "LLM-Pruner"
(arXiv:2305.11627)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import batch_samples
from slim.calibration.sequential import calibration_bytes, transform_checkpoint
from slim.checkpoints.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.core.console import say
from slim.core.errors import SlimError
from slim.core.settings import dataclass_cache_key, require_choice, require_flag, require_number
from slim.data.calibration import Calibration
from slim.models.accounting import MACS_TOKENS, before_and_after
from slim.models.families import FAMILIES
from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.pruning import calibrated
from slim.pruning.rules import default_ends
from slim.pruning.width_scores import FOLDINGS, OWN, UnitScores
from slim.pruning.width_sizes import LLM_PRUNER, Width, pruned_width, width_of, with_widths

if TYPE_CHECKING:
    from slim.pruning.width_method import KeptUnits, WidthMethod

ROUNDING = 64  # of kept channels, where nothing asks for more


@dataclass(kw_only=True)
class WidthPruning(Stage):
    """Settings and steps of every width criterion. Blocks are numbered from 0.

    Attributes:
        ratio: share of the heads and of the MLP channels that goes, between 0 and 1.
        first_block: the first pruned block; None: the first that depth pruning does not protect.
        last_block: the last pruned block, included; None: the last that is not protected.
        rounding: the kept MLP channels (and the attention's output, where it can be) are a multiple
            of this, 1 or more; ``llm_pruner``: exactly its counts; None: 64, or more where a later
            stage of the chain could not divide the result into its groups (see ``look_ahead``).
        uniform: prune all blocks to the same sizes, so that a stock config describes the result.
        reconstruct: refit ``o_proj`` and ``down_proj`` by least squares to what they gave before,
            on calibration text.
        damping: ridge of that fit, 0 or more, in means of the Hessian's diagonal.
        folding: which key/value head a query head's score is credited to: ``own``, or
            ``llm_pruner`` to compare.
        macs_tokens: tokens of the forward pass whose multiply-accumulates are reported.
        calibration: the text for ``reconstruct`` and for criteria that look at data.
    """

    ratio: float = 0.25
    first_block: int | None = None
    last_block: int | None = None
    rounding: int | str | None = None
    uniform: bool = False
    reconstruct: bool = False
    damping: float = 0.01
    folding: str = OWN
    macs_tokens: int = MACS_TOKENS
    calibration: Calibration

    kind: ClassVar[str] = "prune"
    version: ClassVar[int] = 2
    criterion: ClassVar[str]  # name in metadata and pictures

    def __post_init__(self) -> None:
        self._needed = ROUNDING  # by later stages
        calibrated.require_share(
            "pruner.ratio", self.ratio, 0.25, "the share of heads and MLP channels that goes"
        )
        for name in ("first_block", "last_block"):
            if getattr(self, name) is not None:
                require_number(f"pruner.{name}", getattr(self, name), 0, integer=True)
        for name in ("uniform", "reconstruct"):
            require_flag(f"pruner.{name}", getattr(self, name))
        if self.rounding is None:
            pass
        elif isinstance(self.rounding, str):
            require_choice("pruner.rounding", self.rounding, (LLM_PRUNER, "a whole number"))
        else:
            require_number("pruner.rounding", self.rounding, 1, integer=True)
        require_number("pruner.damping", self.damping, 0)
        require_number("pruner.macs_tokens", self.macs_tokens, 1, integer=True)
        require_choice("pruner.folding", self.folding, FOLDINGS)
        self._check_range()

    def _check_range(self) -> None:
        first, last = self.first_block, self.last_block
        if self.uniform and (first, last) != (None, None):
            raise SlimError(
                "pruner.uniform=true prunes all blocks: leave first_block and last_block out."
            )
        if first is not None and last is not None and first > last:
            raise SlimError(
                f"pruner.first_block={first} comes after pruner.last_block={last}. "
                f"Use pruner.first_block={last} pruner.last_block={first}."
            )

    @property
    def chosen_rounding(self) -> int | str:
        """The setting, or what it stands for where it is None."""
        return self._needed if self.rounding is None else self.rounding

    def look_ahead(self, spec: ModelSpec, following: Sequence[Stage]) -> None:
        """Where ``rounding`` is None, let the result fit the groups of the stages that follow.

        Results stay what they are where 64 fits: with groups of 64, and with groups of 128 where
        the channels happen to be divisible.

        Args:
            spec: the model.
            following: the later stages of the chain.
        """
        self._needed = ROUNDING
        if self.rounding is not None:
            return
        multiple = max([ROUNDING, *(stage.input_multiple for stage in following)])
        for block, width in self.widths(spec).items():
            before = width_of(spec, block)
            if width.channels % multiple or (
                before.heads * spec.head_dim % multiple == 0
                and width.heads * spec.head_dim % multiple
            ):
                self._needed = multiple

    def cache_key(self) -> dict:
        settings = dataclass_cache_key(self)
        settings["rounding"] = self.chosen_rounding
        if not self.reconstruct:
            for unused in ("calibration", "damping"):
                settings.pop(unused)
        return settings

    def block_range(self, spec: ModelSpec) -> range:
        """Return the blocks to prune."""
        if self.uniform:
            return range(spec.blocks)
        protected_first, protected_last = default_ends(spec.blocks)
        first = self.first_block
        if first is None:
            first = protected_first
        last = self.last_block
        if last is None:
            last = spec.blocks - 1 - protected_last
        return range(first, last + 1)

    def widths(self, spec: ModelSpec) -> dict[int, Width]:
        """Return the sizes that the pruned blocks will have."""
        return {
            block: pruned_width(spec, block, self.ratio, self.chosen_rounding)
            for block in self.block_range(spec)
        }

    def check(self, spec: ModelSpec) -> None:
        depth = spec.blocks
        family = spec.family  # raises where it is unknown
        spec.require_decoder(
            "Width pruning",
            "a gated MLP and grouped heads",
            "Use pruner=mlp_channels (width), angular or magnitude (blocks), or wanda (weights).",
        )
        if family.fused:
            possible = ", ".join(name for name, known in FAMILIES.items() if not known.fused)
            raise SlimError(
                f"{spec.name} keeps several projections in one matrix ({family.fused[0]}), which "
                f"width pruning cannot cut. It works for {possible}. "
                "Depth and weight pruning work for this model."
            )
        spec.require_plain("Prune first, quantize afterwards.")
        for name in ("first_block", "last_block"):
            if (getattr(self, name) or 0) >= depth:
                raise SlimError(
                    f"pruner.{name}={getattr(self, name)}: {spec.name} has blocks 0 to {depth - 1}."
                )
        if not self.block_range(spec):
            raise SlimError(
                "No block is left to prune between pruner.first_block and pruner.last_block in the "
                f"{depth} blocks of {spec.name}. Give both, such as pruner.first_block=0 "
                f"pruner.last_block={depth - 1}."
            )
        self._check_widths(spec)

    def _check_widths(self, spec: ModelSpec) -> None:
        widths = self.widths(spec)
        for block, width in widths.items():
            if width.kv_heads < 1 or width.channels < 1:
                what = "key/value heads" if width.kv_heads < 1 else "MLP channels"
                raise SlimError(
                    f"pruner.ratio={self.ratio} removes all {what} of block {block}. "
                    "Use a smaller ratio."
                )
        if self.uniform and len(set(widths.values())) > 1:
            raise SlimError(
                f"The blocks of {spec.name} differ in size already. Use pruner.uniform=false."
            )
        if all(width == width_of(spec, block) for block, width in widths.items()):
            raise SlimError(
                f"pruner.ratio={self.ratio} removes nothing from {spec.name} with "
                f"pruner.rounding={self.chosen_rounding}. "
                "Use a larger ratio, or a smaller rounding."
            )
        with_widths(spec, widths)  # raises where no config can hold the result

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        return with_widths(spec, self.widths(spec))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        block = (
            calibrated.LIBRARY_BYTES
            + 2 * 4 * spec.block_parameters()
            + calibrated.shard_bytes(spec)
        )
        if self.reconstruct:
            length = min(self.calibration.length, spec.context_length)
            widest = max(columns for _, columns in spec.block_linears().values())
            block += calibration_bytes(spec, self.calibration.samples, length) + 3 * 8 * widest**2
        return max(self.scoring_bytes(spec, device), block)

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        """Estimate the peak memory of scoring, in bytes."""
        largest = max(rows * columns for rows, columns in spec.block_linears().values())
        return calibrated.LIBRARY_BYTES + largest * (DTYPE_BYTES.get(spec.dtype, 4) + 3 * 4)

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        """Return the scores of the units of every block in ``blocks``; the smallest go.

        Args:
            source: the model.
            blocks: that are pruned.
            context: device and progress of the stage.
        """
        raise NotImplementedError

    def run(self, source: Path, target: Path, context: Context) -> dict:
        # imports torch
        from slim.pruning.width_method import KeptUnits, WidthMethod

        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        widths = self.widths(spec)
        if heads_stay(spec, widths):
            say(
                f"pruner.ratio={self.ratio} removes no whole key/value group of the "
                f"{spec.kv_heads} in a block: only MLP channels are pruned."
            )
        scores = self.scores(checkpoint, self.block_range(spec), context)
        kept = {}
        for block, block_scores in scores.items():
            kept[block] = KeptUnits.of(spec, block, widths[block], block_scores)
        method = WidthMethod(spec, kept, self.damping if self.reconstruct else None)
        self._write(checkpoint, target, method, context)
        metadata = self._report(target, spec, kept, scores)
        return {**metadata, **method.metadata()}

    def _write(
        self, checkpoint: Checkpoint, target: Path, method: WidthMethod, context: Context
    ) -> None:
        """Write the narrower model."""
        tokens = None
        # without a fit the errors are those of weights alone, which are no curve to record
        recorded = Context(context.device)
        if self.reconstruct:
            tokens = self.calibration.tokens_for(checkpoint)
            recorded = context
        config = self.output_spec(checkpoint.spec).config
        transform_checkpoint(checkpoint, target, method, config, recorded, tokens)

    def _report(
        self, target: Path, spec: ModelSpec, kept: dict[int, KeptUnits],
        scores: dict[int, UnitScores],
    ) -> dict:  # fmt: skip
        """Write scores and pictures for people and return what the manifest says of the result."""
        # imports matplotlib
        from slim.pruning.width_report import write_report

        result = self.output_spec(spec)
        account = before_and_after(spec, result, self.macs_tokens)
        write_report(target / REPORT, self.criterion, spec, result, kept, scores, account)
        widths = self.widths(spec)
        metadata = {
            "criterion": self.criterion,
            "ratio": self.ratio,
            "pruned_blocks": list(widths),
            "sizes": {str(block): dataclasses.asdict(width) for block, width in widths.items()},
            "heads_pruned": not heads_stay(spec, widths),
        }
        for key, value in account.items():
            if not key.startswith("blocks_"):  # their number stays
                metadata[key] = value
        return metadata


def heads_stay(spec: ModelSpec, widths: dict[int, Width]) -> bool:
    """Whether no block loses a key/value group."""
    return all(width.kv_heads == width_of(spec, block).kv_heads for block, width in widths.items())


@dataclass(kw_only=True)
class CalibratedWidthPruning(WidthPruning):
    """A width criterion that looks at calibration samples.

    Attributes:
        samples: windows for the scores, 1 or more; None: the calibration's number, which
            ``reconstruct`` always uses.
        length: tokens per window for the scores, 8 or more; None: the calibration's.
    """

    samples: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.windows = calibrated.chosen_windows(self.calibration, self.samples, self.length)

    def cache_key(self) -> dict:
        """The samples as they are used, for the scores and, if there is one, for the fit."""
        settings = {**super().cache_key(), "windows": self.windows.cache_key()}
        for replaced in ("samples", "length"):
            settings.pop(replaced)
        return settings

    def load(self, source: Checkpoint, context: Context):
        """Return the loaded model and the tokens for the scores, int64 [samples, length], on the
        CPU."""
        return calibrated.load_with_tokens(source, self.windows, context)

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        samples = min(self.windows.samples, batch_samples(self.windows.length))
        return calibrated.forward_bytes(spec, device, samples, self.windows.length)
