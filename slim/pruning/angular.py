"""A run of blocks by angular distance: the n successive blocks that turn the hidden state least are
removed.

    d(x_l, x_{l+n}) = 1/pi * arccos( x_l . x_{l+n} / (|x_l| |x_{l+n}|) ),    l* = argmin_l d

with x_l the input of block l (the residual stream, before any norm) at the last token of a sample,
averaged over the samples. Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers"
(arXiv:2403.17887), section 3.2.

As in PruneMe, runs start at block 1 at the earliest: the first block, which turns embeddings into
hidden states, stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import BlockChain, batches
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.console import progress_bar
from slim.core.lazy import LazyModule
from slim.models.spec import ModelSpec
from slim.pruning.depth import CalibratedDepthPruning, Choice
from slim.pruning.rules import require_numbers

if TYPE_CHECKING:
    import torch

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")


def angular_distance(states: torch.Tensor) -> torch.Tensor:
    """Return the angle over pi between every two states, from 0 to 1.

    Args:
        states: [..., n, hidden].

    Returns:
        float64 [..., n, n].
    """
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    return torch.arccos((unit @ unit.mT).clamp(-1, 1)) / torch.pi


def choose_run(distances: Iterable[Sequence[float]]) -> tuple[int, int]:
    """Return (start, end) of the smallest distance; of equal ones the first.

    Args:
        distances: rows (start, end, distance), blocks ``start`` to ``end - 1`` being the run.

    Raises:
        SlimError: for a distance that is not a number.
    """
    rows = list(distances)
    require_numbers([distance for _, _, distance in rows])
    start, end, _ = min(rows, key=lambda row: row[2])  # min returns the first of equal rows
    return start, end


def candidate_runs(
    blocks: int, length: int, protected: Iterable[int] = ()
) -> list[tuple[int, int]]:
    """Return (start, end) of every run without a protected block.

    Args:
        blocks: depth of the model.
        length: blocks in a run.
        protected: blocks that stay.
    """
    protected = set(protected)
    runs = []
    for start in range(blocks - length + 1):
        if protected.isdisjoint(range(start, start + length)):
            runs.append((start, start + length))
    return runs


def state_distances(
    model, family: Family, tokens: torch.Tensor, advance: Callable[[], object] = lambda: None
) -> torch.Tensor:
    """Return the mean angular distance between the inputs of every two blocks at the last token.

    Args:
        model: loaded.
        family: of the model.
        tokens: int64 [samples, length].
        advance: called after every batch.

    Returns:
        float64 [L + 1, L + 1]; the last row and column stand for the output of the last block.
    """
    chain = BlockChain(model, family)
    total = torch.zeros(len(chain) + 1, len(chain) + 1, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(tokens):
            total += angular_distance(last_states(chain, batch)).sum(dim=0).cpu()
            advance()
    return total / len(tokens)


def last_states(chain: BlockChain, tokens: torch.Tensor) -> torch.Tensor:
    """Return the inputs of all blocks and the output of the last, at the last token.

    Args:
        chain: the model's blocks.
        tokens: int64 [samples, length].

    Returns:
        [samples, L + 1, hidden].
    """
    hidden = chain.enter(tokens)
    states = [hidden[:, -1]]
    for index in range(len(chain)):
        hidden = chain.step(index, hidden)
        states.append(hidden[:, -1])
    return torch.stack(states, dim=1)


@dataclass(kw_only=True)
class Angular(CalibratedDepthPruning):
    """``pruner=angular``. Settings: see :class:`CalibratedDepthPruning`.

    Unless the settings say otherwise, block 0 alone is protected: runs start at 1 to L - n, as in
    PruneMe."""

    cache_name: ClassVar[str] = "Angular"

    criterion: ClassVar[str] = "angular"
    limit_note: ClassVar[str] = " in one run"

    def default_ends(self, blocks: int) -> tuple[int, int]:
        return 1, 0

    def removable(self, blocks: int) -> int:
        protected = self.protected(blocks)
        for length in range(blocks - 1, 0, -1):
            if candidate_runs(blocks, length, protected):
                return length
        return 0

    def choose(self, source: Checkpoint, context: Context) -> Choice:
        model, tokens = self.load(source, context)
        with progress_bar("Angular distances", total=len(batches(tokens))) as advance:
            distances = state_distances(model, source.spec.family, tokens, advance).tolist()
        depth = source.spec.blocks
        length = self.wanted(depth)
        runs = []
        for start, end in candidate_runs(depth, length, self.protected(depth)):
            runs.append((start, end, distances[start][end]))
        start, end = choose_run(runs)
        distances_by_length = by_length(distances)
        return Choice(
            removed=list(range(start, end)),
            scores=distances_by_length[length - 1],
            details={"runs": runs, "distances": distances_by_length},
        )

    def plot(self, path: Path, choice: Choice, depth: int) -> None:
        # imports matplotlib
        from slim.core.figures import run_distances

        starts = [start for start, _, _ in choice.details["runs"]]
        run_distances(path, choice.scores, choice.details["distances"], starts, choice.removed)

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        return self.batch_bytes(spec, device)


def by_length(distances: list[list[float]]) -> list[list[float]]:
    """Rearrange a matrix over two inputs by the length of the run between them.

    Args:
        distances: [L + 1, L + 1].

    Returns:
        A row per length from 1 to L, each over the starts from 0 to L - length.
    """
    depth = len(distances) - 1
    rows = []
    for length in range(1, depth + 1):
        rows.append([distances[start][start + length] for start in range(depth - length + 1)])
    return rows
