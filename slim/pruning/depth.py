"""Depth pruning: whole decoder blocks are removed. What its criteria share: settings, protection,
choice, report.

A criterion gives every block (or every run of blocks) a score; this file turns scores into the
blocks that go, writes the shorter model and a table and a picture of the scores. Criteria:
``taylor.py``, ``magnitude.py``, ``ppl.py`` (Kim et al., "Shortened LLaMA", arXiv:2402.02834) and
``angular.py`` (Gromov et al., arXiv:2403.17887)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from slim.calibration.loaded_blocks import batch_samples
from slim.calibration.sequential import calibration_bytes
from slim.checkpoints.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import write_blocks
from slim.core.console import progress_bar
from slim.core.errors import SlimError
from slim.core.settings import cache_key, dataclass_cache_key, require_flag, require_number
from slim.data.calibration import Calibration
from slim.models.accounting import MACS_TOKENS, before_and_after
from slim.models.families import FAMILIES
from slim.models.spec import ModelSpec
from slim.pruning.calibrated import (
    LIBRARY_BYTES,
    chosen_windows,
    forward_bytes,
    load_with_tokens,
    shard_bytes,
)
from slim.pruning.rules import (
    block_list,
    default_blocks,
    default_ends,
    is_share,
    removal_order,
    share_of_blocks,
)
from slim.pruning.written import EXPECTED_TOKENS, check_blocks, expected_of_blocks


@dataclass
class Choice:
    """What a criterion decided.

    Attributes:
        removed: the blocks to remove, ascending.
        scores: one number per block (for runs: per start), or empty.
        details: further entries for the score file, plain JSON values.
    """

    removed: list[int]
    scores: list[float] = field(default_factory=list)
    details: dict = field(default_factory=dict)


@dataclass
class DepthPruning(Stage):
    """Settings and steps of every depth criterion. Blocks are numbered from 0.

    Attributes:
        blocks: how many to remove, or which share of all blocks (above 0 and below 1), half rounded
            up, at least 1; None: 6 of 32 in proportion to the depth.
        protect_first: so many blocks at the input are never removed; None: 4 at 32 blocks and more,
            in proportion below, at least 1.
        protect_last: the same at the output; None: 2.
        protect: the protected blocks as a list, instead of the two numbers; None: the two count.
        remove: the blocks to remove as a list: nothing is scored. None: the criterion chooses.
        reconstruct: fit a linear map over each gap on calibration text and fold it into the
            projection before it.
        damping: ridge of that fit, 0 or more, in means of the Hessian's diagonal.
        macs_tokens: tokens of the forward pass whose multiply-accumulates are reported.
        calibration: the text for ``reconstruct``.
    """

    blocks: int | float | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    protect: list[int] | None = None
    remove: list[int] | None = None
    reconstruct: bool = False
    damping: float = 0.01
    macs_tokens: int = MACS_TOKENS
    calibration: Calibration | None = None

    kind: ClassVar[str] = "prune"
    criterion: ClassVar[str]  # name in metadata and plots
    score_label: ClassVar[str] = "score"  # what a score is, with its unit
    # whether scores are made of the loss of predicted tokens, which encoders have not
    needs_loss: ClassVar[bool] = False
    # why no more blocks can be removed, where protection alone does not tell
    limit_note: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if isinstance(self.blocks, float) and not is_share(self.blocks):
            raise SlimError(
                f"pruner.blocks={self.blocks}: must be a whole number of at least 1, or a share of "
                "the blocks above 0 and below 1."
            )
        if self.blocks is not None and not is_share(self.blocks):
            require_number("pruner.blocks", self.blocks, 1, integer=True)
        for name in ("protect_first", "protect_last"):
            if getattr(self, name) is not None:
                require_number(f"pruner.{name}", getattr(self, name), 0, integer=True)
        require_flag("pruner.reconstruct", self.reconstruct)
        require_number("pruner.damping", self.damping, 0)
        require_number("pruner.macs_tokens", self.macs_tokens, 1, integer=True)
        if self.reconstruct and self.calibration is None:
            raise SlimError(
                "pruner.reconstruct=true needs a text: pruner.calibration=${calibration}."
            )
        self.protect = block_list("pruner.protect", self.protect)
        self.remove = block_list("pruner.remove", self.remove)
        self._check_lists()

    def _check_lists(self) -> None:
        if self.protect is not None and (self.protect_first, self.protect_last) != (None, None):
            raise SlimError(
                "pruner.protect names all protected blocks: leave pruner.protect_first and "
                "protect_last out."
            )
        if self.remove is None:
            return
        if not self.remove:
            raise SlimError(
                "pruner.remove=[] removes nothing. Use pruner=none to leave the model as it is."
            )
        if self.blocks not in (None, len(self.remove)):
            raise SlimError(
                f"pruner.remove names {len(self.remove)} blocks but pruner.blocks={self.blocks}. "
                "Give one of them."
            )
        both = sorted(set(self.remove) & set(self.protect or ()))
        if both:
            raise SlimError(
                f"pruner.remove and pruner.protect both name block {both[0]}. "
                "Take it out of one of them."
            )

    def cache_key(self) -> dict:
        if self.remove is None:
            settings = {**dataclass_cache_key(self), **self.scoring_identity()}
        else:  # the same blocks whatever the criterion's name
            settings = {
                "class": "DepthPruning",
                "remove": self.remove,
                "macs_tokens": self.macs_tokens,
            }
        for name in ("reconstruct", "damping", "calibration"):
            settings.pop(name, None)
        if self.reconstruct:
            settings["damping"] = self.damping
            settings["calibration"] = cache_key(self.calibration)
        return settings

    def scoring_identity(self) -> dict:
        """Return what determines the scores besides the fields."""
        return {}

    def protected(self, blocks: int) -> list[int]:
        """Return the protected blocks of a model of ``blocks`` blocks, ascending."""
        if self.protect is not None:
            return self.protect
        first, last = self.default_ends(blocks)
        if self.protect_first is not None:
            first = self.protect_first
        if self.protect_last is not None:
            last = self.protect_last
        return [block for block in range(blocks) if block < first or block >= blocks - last]

    def default_ends(self, blocks: int) -> tuple[int, int]:
        """Return how many blocks are protected at both ends where the settings do not say."""
        return default_ends(blocks)

    def removable(self, blocks: int) -> int:
        """Return how many blocks can be removed at most: those not protected, and one has to
        stay."""
        return min(blocks - 1, blocks - len(self.protected(blocks)))

    def wanted(self, blocks: int) -> int:
        """Return how many blocks of a model of ``blocks`` blocks are to be removed."""
        if is_share(self.blocks):
            return share_of_blocks(self.blocks, blocks)
        return self.blocks or default_blocks(blocks)

    def check(self, spec: ModelSpec) -> None:
        depth = spec.blocks
        spec.family  # noqa: B018 - raises where the family is unknown
        if self.needs_loss and self.remove is None:
            spec.require_decoder(
                f"pruner={self.criterion}",
                "the loss of predicted tokens",
                "Use pruner=angular, block_influence or magnitude, or name blocks: "
                "pruner.remove=[2,4].",
            )
        spec.require_plain("Prune first, quantize afterwards.")
        if self.reconstruct:
            self._require_foldable(spec)
        for setting, blocks in (("protect", self.protect), ("remove", self.remove)):
            for block in blocks or ():
                if block >= depth:
                    raise SlimError(
                        f"pruner.{setting} names block {block}: {spec.name} has blocks 0 to "
                        f"{depth - 1}."
                    )
        if self.remove is None:
            if self.wanted(depth) > self.removable(depth):
                raise SlimError(self._too_many(spec))
        elif len(self.remove) == depth:
            raise SlimError(
                f"pruner.remove names all {depth} blocks of {spec.name}. At least one has to stay."
            )

    def _require_foldable(self, spec: ModelSpec) -> None:
        """Require that nothing but an addition follows the projection a map is folded into."""
        if not spec.family.norms_outputs:
            return
        possible = ", ".join(name for name, family in FAMILIES.items() if not family.norms_outputs)
        raise SlimError(
            f"pruner.reconstruct=true cannot fold its map into a projection of {spec.name}: a norm "
            f"follows it. Leave it out; it works for {possible}."
        )

    def _too_many(self, spec: ModelSpec) -> str:
        """Return the message for more blocks than can be removed."""
        protected = self.protected(spec.blocks)
        most = max(0, self.removable(spec.blocks))
        advice = "Protect fewer"
        if most > 0:
            advice = f"Set pruner.blocks to at most {most}, or protect fewer"
        return (
            f"pruner.blocks={self.wanted(spec.blocks)} is too many: {spec.name} has {spec.blocks} "
            f"blocks, protected {protected or 'none'}, so {most} can be removed{self.limit_note}.\n"
            f"{advice} (pruner.protect_first=0 pruner.protect_last=0 protects none)."
        )

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        if self.remove is not None:
            return spec.with_blocks(kept_blocks(spec.blocks, self.remove))
        return spec.with_blocks(list(range(spec.blocks - self.wanted(spec.blocks))))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        scoring = 0 if self.remove is not None else self.scoring_bytes(spec, device)
        fitting = self.fitting_bytes(spec) if self.reconstruct else 0
        return max(scoring, LIBRARY_BYTES + shard_bytes(spec) + fitting)

    def fitting_bytes(self, spec: ModelSpec) -> int:
        """Estimate the peak memory of ``reconstruct``, in bytes: a block, both hidden states, a
        projection's inputs, the fit."""
        samples = self.calibration.samples
        length = min(self.calibration.length, spec.context_length)
        block = 2 * 4 * spec.block_parameters()
        states = calibration_bytes(spec, samples, length)
        inputs = 4 * samples * length * (spec.intermediate_size + spec.hidden_size)
        fit = 3 * 8 * spec.intermediate_size**2
        return block + states + inputs + fit

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        """Estimate the peak memory of scoring, in bytes."""
        raise NotImplementedError

    def choose(self, source: Checkpoint, context: Context) -> Choice:
        """Score the blocks of ``source`` and choose which to remove.

        Args:
            source: the model.
            context: device and progress of the stage.
        """
        return self.choose_by(self.scores(source, context), source.spec.blocks)

    def choose_by(self, scores: list[float], depth: int) -> Choice:
        """Choose the blocks with the smallest scores.

        Args:
            scores: one per block.
            depth: number of blocks.
        """
        order = removal_order(scores, self.protected(depth))
        return Choice(sorted(order[: self.wanted(depth)]), scores, {"order": order})

    def scores(self, source: Checkpoint, context: Context) -> list[float]:
        """Return one score per block; the smallest is removed first."""
        raise NotImplementedError

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        self.check(checkpoint.spec)
        criterion = self.criterion
        if self.remove is None:
            choice = self.choose(checkpoint, context)
        else:
            choice = Choice(self.remove)
            criterion = "list"

        gaps = self._write(checkpoint, target, choice.removed, context)
        result = open_checkpoint(target)
        self._check_written(checkpoint, result, choice.removed, gaps)
        metadata = {
            "criterion": criterion,
            "removed_blocks": choice.removed,
            "kept_blocks": kept_blocks(checkpoint.spec.blocks, choice.removed),
            "scores": choice.scores,
            **gaps,
        }
        account = before_and_after(checkpoint.spec, result.spec, self.macs_tokens)
        if choice.scores:
            report = {**metadata, **account}
            self._report(target / REPORT, report, choice, checkpoint.spec.blocks)
        for key, value in account.items():
            if not key.startswith("blocks_"):  # said by kept_blocks
                metadata[key] = value
        return metadata

    def _write(
        self, source: Checkpoint, target: Path, removed: list[int], context: Context
    ) -> dict:
        """Write the shorter model.

        Returns:
            Empty; with ``reconstruct`` ``gaps`` (the fields of each ``Gap``) and
            ``unbridged_blocks``, the removed ones that nothing comes before.
        """
        kept = kept_blocks(source.spec.blocks, removed)
        if not self.reconstruct:
            write_blocks(source, target, kept)
            context.expected = lambda: expected_of_blocks(source, kept, context.device)
            return {}
        # imports torch
        from slim.pruning.reconstruction import Reconstruction

        tokens = self.calibration.tokens_for(source)
        reconstruction = Reconstruction(source, removed, tokens, self.damping, context.device)
        with progress_bar("Bridging gaps", total=source.spec.blocks) as advance:
            gaps = reconstruction.write(target, advance=advance)
        hidden, next_block = reconstruction.hidden_after_gaps(EXPECTED_TOKENS)
        rest = [block for block in kept if block >= next_block]
        some = tokens[:1, :EXPECTED_TOKENS].clone()
        context.expected = lambda: expected_of_blocks(source, rest, context.device, some, hidden)
        bridged: set[int] = set()
        for gap in gaps:
            bridged.update(gap.removed)
        return {
            "gaps": [dataclasses.asdict(gap) for gap in gaps],
            "unbridged_blocks": [block for block in removed if block not in bridged],
        }

    def _check_written(
        self, source: Checkpoint, result: Checkpoint, removed: list[int], gaps: dict
    ) -> None:
        """Compare the kept blocks with the source's; the projections before gaps were refitted."""
        kept = kept_blocks(source.spec.blocks, removed)
        family = source.spec.family
        last = family.linear_groups[-1].linears[0]
        refitted = []
        for gap in gaps.get("gaps", ()):
            refitted.append(f"{family.blocks}.{kept.index(gap['block'])}.{last}.weight")
        check_blocks(source, result, kept, refitted)

    def _report(self, folder: Path, content: dict, choice: Choice, depth: int) -> None:
        """Write the table and the picture of the scores."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {**content, "protected_blocks": self.protected(depth), **choice.details}
        (folder / "block_scores.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
        self.plot(folder / "block_scores.png", choice, depth)

    def plot(self, path: Path, choice: Choice, depth: int) -> None:
        """Draw the scores."""
        # imports matplotlib
        from slim.core.figures import bar_scores

        bar_scores(
            path,
            choice.scores,
            choice.removed,
            self.protected(depth),
            score=self.score_label,
            title=f"{self.criterion}: {len(choice.removed)} of {depth} blocks removed",
            reference=choice.details.get("unpruned"),
        )


def kept_blocks(depth: int, removed: list[int]) -> list[int]:
    """Return the blocks of ``depth`` that are not in ``removed``, ascending."""
    return [block for block in range(depth) if block not in removed]


@dataclass(kw_only=True)
class CalibratedDepthPruning(DepthPruning):
    """A depth criterion that looks at calibration samples.

    Attributes:
        samples: windows for the scores, 1 or more; None: the calibration's number, which
            ``reconstruct`` always uses.
        length: tokens per window for the scores, 8 or more; None: the calibration's.
    """

    samples: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is None:
            raise SlimError(
                f"pruner={self.criterion} needs a text: pruner.calibration=${{calibration}}."
            )
        self.windows = chosen_windows(self.calibration, self.samples, self.length)

    def scoring_identity(self) -> dict:
        """The samples as they are used: settings of the calibration that the pruner replaces do not
        count."""
        return {"samples": None, "length": None, "windows": self.windows.cache_key()}

    def load(self, source: Checkpoint, context: Context):
        """Return the loaded model and its calibration tokens, int64 [samples, length], on the
        CPU."""
        return load_with_tokens(source, self.windows, context)

    def batch_bytes(self, spec: ModelSpec, device: str) -> int:
        """Estimate the peak memory of a forward pass, batch by batch, in bytes."""
        samples = min(self.windows.samples, batch_samples(self.windows.length))
        return forward_bytes(spec, device, samples, self.windows.length)
