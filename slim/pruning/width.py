"""Width pruning: attention heads and MLP channels are removed. What its criteria share: settings, counts, report.

Whole key/value groups go, each a key/value head with the query heads that read it, and MLP channels, coupled over
q/k/v/o and gate/up/down, so that every matrix only becomes smaller. Criteria give every unit of a block a score
(``width_magnitude.py``, ``width_taylor.py``, ``width_activation.py``); the units of a block compete with one another.
Ma et al., "LLM-Pruner" (arXiv:2305.11627).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.accounting import MACS_TOKENS, before_and_after
from slim.architecture import DTYPE_BYTES, ModelDescription
from slim.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.data.calibration import Calibration
from slim.errors import SlimError
from slim.families import FAMILIES
from slim.pruning import calibrated
from slim.pruning.forward import batch_samples
from slim.pruning.rules import default_ends
from slim.pruning.width_scores import FOLDINGS, OWN, UnitScores
from slim.pruning.width_sizes import LLM_PRUNER, Width, pruned_width, width_of, with_widths
from slim.settings import dataclass_identity, require_choice, require_flag, require_number
from slim.stage import Context, Stage

if TYPE_CHECKING:
    from slim.pruning.width_visitor import Kept


@dataclass(kw_only=True)
class WidthPruning(Stage):
    """Settings and steps of every width criterion. Blocks are numbered from 0.

    ratio: share of the heads and of the MLP channels that goes, between 0 and 1.
    first_block, last_block: the pruned blocks, both included; None: all but the protected ends of depth pruning.
    rounding: the kept MLP channels (and the attention's output, where it can be) are a multiple of this;
        ``llm_pruner``: exactly its counts.
    uniform: prune all blocks to the same sizes, so that a stock config describes the result.
    reconstruct: refit ``o_proj`` and ``down_proj`` by least squares to what they gave before, on calibration text.
    damping: ridge of that fit, in means of the Gram matrix's diagonal.
    folding: which key/value head a query head's score is credited to: ``own``, or ``llm_pruner`` to compare.
    macs_tokens: length of the forward whose multiply-accumulates are reported.
    calibration: the text for ``reconstruct`` and for criteria that look at data.
    """

    ratio: float = 0.25
    first_block: int | None = None
    last_block: int | None = None
    rounding: int | str = 64
    uniform: bool = False
    reconstruct: bool = False
    damping: float = 0.01
    folding: str = OWN
    macs_tokens: int = MACS_TOKENS
    calibration: Calibration

    kind: ClassVar[str] = "prune"
    version: ClassVar[int] = 2
    criterion: ClassVar[str]  # name in facts and pictures

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 < self.ratio < 1:
            raise SlimError(
                f"pruner.ratio={self.ratio} is not possible. It takes a number between 0 and 1, such as 0.25: the "
                "share of heads and MLP channels that goes. Use pruner=none to leave the model as it is."
            )
        for name in ("first_block", "last_block"):
            if getattr(self, name) is not None:
                require_number(f"pruner.{name}", getattr(self, name), 0, integer=True)
        for name in ("uniform", "reconstruct"):
            require_flag(f"pruner.{name}", getattr(self, name))
        if isinstance(self.rounding, str):
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
            raise SlimError("pruner.uniform=true prunes all blocks: leave first_block and last_block out.")
        if first is not None and last is not None and first > last:
            raise SlimError(
                f"pruner.first_block={first} lies behind pruner.last_block={last}. "
                f"Use pruner.first_block={last} pruner.last_block={first}."
            )

    def identity(self) -> dict:
        settings = dataclass_identity(self)
        if not self.reconstruct:
            for unused in ("calibration", "damping"):
                settings.pop(unused)
        return settings

    def block_range(self, model: ModelDescription) -> range:
        """Return the blocks to prune."""
        if self.uniform:
            return range(model.blocks)
        before, behind = default_ends(model.blocks)
        first = before if self.first_block is None else self.first_block
        last = model.blocks - 1 - behind if self.last_block is None else self.last_block
        return range(first, last + 1)

    def widths(self, model: ModelDescription) -> dict[int, Width]:
        """Return the sizes that the pruned blocks will have."""
        return {block: pruned_width(model, block, self.ratio, self.rounding) for block in self.block_range(model)}

    def check(self, model: ModelDescription) -> None:
        depth, family = model.blocks, model.family  # the family raises where it is unknown
        if family.fused:
            possible = ", ".join(name for name, other in FAMILIES.items() if not other.fused)
            raise SlimError(
                f"{model.name} keeps several projections in one matrix ({family.fused[0]}), which width pruning cannot cut. "
                f"It works for {possible}. Depth and weight pruning work for this model."
            )
        model.require_merged()
        if model.quantization is not None:
            raise SlimError(
                f"{model.name} is already quantised: prune first, quantise afterwards (or start from its parent)."
            )
        for name in ("first_block", "last_block"):
            if (getattr(self, name) or 0) >= depth:
                raise SlimError(f"pruner.{name}={getattr(self, name)}: {model.name} has blocks 0 to {depth - 1}.")
        if not self.block_range(model):
            raise SlimError(
                f"No block is left to prune between pruner.first_block and pruner.last_block in the {depth} blocks of "
                f"{model.name}. Give both, such as pruner.first_block=0 pruner.last_block={depth - 1}."
            )
        self._check_widths(model)

    def _check_widths(self, model: ModelDescription) -> None:
        widths = self.widths(model)
        for block, width in widths.items():
            if width.kv_heads < 1 or width.channels < 1:
                what = "key/value heads" if width.kv_heads < 1 else "MLP channels"
                raise SlimError(f"pruner.ratio={self.ratio} removes all {what} of block {block}. Use a smaller ratio.")
        if self.uniform and len(set(widths.values())) > 1:
            raise SlimError(f"The blocks of {model.name} differ in size already. Use pruner.uniform=false.")
        if all(width == width_of(model, block) for block, width in widths.items()):
            raise SlimError(
                f"pruner.ratio={self.ratio} removes nothing from {model.name} with pruner.rounding={self.rounding}. "
                "Use a larger ratio, or a smaller rounding."
            )
        with_widths(model, widths)

    def expect(self, model: ModelDescription) -> ModelDescription:
        return with_widths(model, self.widths(model))

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        from slim.blockwise import walk_bytes

        block = calibrated.LIBRARY_BYTES + 2 * 4 * model.block_parameters() + calibrated.shard_bytes(model)
        if self.reconstruct:
            length = min(self.calibration.length, model.context_length)
            widest = max(columns for _, columns in model.block_linears().values())
            block += walk_bytes(model, self.calibration.samples, length) + 3 * 8 * widest**2
        return max(self.scoring_bytes(model, device), block)

    def scoring_bytes(self, model: ModelDescription, device: str) -> int:
        """Estimate the peak memory of scoring, in bytes."""
        largest = max(rows * columns for rows, columns in model.block_linears().values())
        return calibrated.LIBRARY_BYTES + largest * (DTYPE_BYTES.get(model.dtype, 4) + 3 * 4)

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        """Return the scores of the units of every block in ``blocks``; the smallest go."""
        raise NotImplementedError

    def run(self, source: Path, target: Path, context: Context) -> dict:
        from slim.pruning.width_visitor import Kept, WidthVisitor

        checkpoint = open_checkpoint(source)
        model = checkpoint.description
        self.check(model)
        widths = self.widths(model)
        self._say_if_heads_stay(model, widths)
        scores = self.scores(checkpoint, self.block_range(model), context)
        kept = {block: Kept.of(model, block, widths[block], found) for block, found in scores.items()}
        visitor = WidthVisitor(model, kept, self.damping if self.reconstruct else None)
        self._write(checkpoint, target, visitor, context)
        return self._report(target, model, kept, scores, visitor)

    def _say_if_heads_stay(self, model: ModelDescription, widths: dict[int, Width]) -> None:
        if heads_stay(model, widths):
            from slim.progress import console

            console().print(
                f"pruner.ratio={self.ratio} removes no whole key/value group of the {model.kv_heads} in a block: "
                "only MLP channels are pruned."
            )

    def _write(self, checkpoint: Checkpoint, target: Path, visitor, context: Context) -> None:
        from slim.blockwise import rewrite
        from slim.checkpoint import load_tokenizer

        model, tokens = checkpoint.description, None
        if self.reconstruct:
            tokens = self.calibration.tokens(load_tokenizer(checkpoint.folder), model.context_length)
        recorded = context if self.reconstruct else Context(context.device)  # errors of weights alone are no curve
        rewrite(checkpoint, target, visitor, self.expect(model).config, recorded, tokens)

    def _report(self, target: Path, model, kept: dict[int, Kept], scores: dict[int, UnitScores], visitor) -> dict:
        """Write scores and pictures for people and return the facts for the manifest."""
        from slim.pruning.width_report import write_report

        result = self.expect(model)
        account = before_and_after(model, result, self.macs_tokens)
        write_report(target / REPORT, self.criterion, model, result, kept, scores, account)
        widths = self.widths(model)
        facts = {
            "criterion": self.criterion,
            "ratio": self.ratio,
            "pruned_blocks": list(widths),
            "sizes": {str(block): dataclasses.asdict(width) for block, width in widths.items()},
            "heads_pruned": not heads_stay(model, widths),
            **{key: value for key, value in account.items() if not key.startswith("blocks_")},
        }
        return {**facts, **visitor.facts()}


def heads_stay(model: ModelDescription, widths: dict[int, Width]) -> bool:
    """Whether no block loses a key/value group."""
    return all(width.kv_heads == width_of(model, block).kv_heads for block, width in widths.items())


@dataclass(kw_only=True)
class CalibratedWidthPruning(WidthPruning):
    """A width criterion that looks at calibration samples.

    samples, length: windows and tokens per window for the scores, in place of the calibration's own; None: the
        calibration's, which ``reconstruct`` always uses.
    """

    samples: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.windows = calibrated.chosen_windows(self.calibration, self.samples, self.length)

    def identity(self) -> dict:
        """The samples as they are used, for the scores and, if there is one, for the fit."""
        settings = {**super().identity(), "windows": self.windows.identity()}
        for replaced in ("samples", "length"):
            settings.pop(replaced)
        return settings

    def load(self, source: Checkpoint, context: Context):
        """Return the loaded model and the tokens for the scores, int64 [samples, length], on the CPU."""
        return calibrated.load_with_tokens(source, self.windows, context)

    def scoring_bytes(self, model: ModelDescription, device: str) -> int:
        samples = min(self.windows.samples, batch_samples(self.windows.length))
        return calibrated.forward_bytes(model, device, samples, self.windows.length)
