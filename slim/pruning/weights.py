"""Weight pruning: single weights of the blocks' linear layers become zero, anywhere or in an n:m
pattern.

    magnitude_weights   score |W_ij|            the smallest of a layer
    wanda               score |W_ij| * |X_j|    the smallest of a row; |X_j|^2 = H_jj
    sparsegpt           see sparsegpt.py        the smallest of 128 columns, the others are updated

Wanda: Sun et al., arXiv:2306.11695. All run in sequential calibration: each linear group of a block
sees the pruned ones before it. Zeros are stored like other numbers: they save neither memory nor
time without an engine that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.block_method import BlockMethod, LinearGroup
from slim.calibration.errors import LayerError, relative_error
from slim.calibration.sequential import calibration_bytes, transform_checkpoint
from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.meta_model import stored_dtype
from slim.checkpoints.stage import Context, Stage
from slim.core.console import say
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import dataclass_cache_key, require_number
from slim.data.calibration import Calibration
from slim.models.spec import ModelSpec
from slim.pruning import calibrated
from slim.pruning.masks import largest_kept, n_of_m_kept
from slim.pruning.sparsegpt import sparsegpt
from slim.pruning.written import check_zeros

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

NOTE = (
    "Zeros are stored like other weights: they save neither memory nor time without an engine that "
    "uses them."
)


class SparsityMethod(BlockMethod):
    """A weight pruning method in sequential calibration, with the settings of its stage."""

    resumable = True
    only_zeros = True  # whether the weights that stay keep their values

    def __init__(self, stage: WeightPruning, source: Checkpoint):
        """Take the settings.

        Args:
            stage: whose share and pattern count.
            source: the model, whose tensors keep the types they are stored in.
        """
        self.sparsity = stage.share
        self.n_of_m = stage.n_of_m
        self.tensors = source.tensors
        self.zeros: list[dict] = []  # per layer: how many of its weights are zero

    def state(self) -> dict:
        return {"zeros": self.zeros}

    def resume(self, state: dict) -> None:
        self.zeros = state["zeros"]

    def process(self, group: LinearGroup) -> dict[str, float]:
        errors = {}
        for name, linear in group.linears.items():
            _, dtype, _ = self.tensors[f"{group.prefix}.{name}.weight"]
            # as they will be stored
            pruned = self.prune(linear.weight, group).to(stored_dtype(dtype)).float()
            errors[name] = relative_error(pruned - linear.weight, linear.weight, group.hessian)
            linear.weight.copy_(pruned)
            zeros = pruned.numel() - int(torch.count_nonzero(pruned))
            self.zeros.append({"zeros": zeros, "weights": pruned.numel()})
        return errors

    def prune(self, weight: torch.Tensor, group: LinearGroup) -> torch.Tensor:
        """Return the pruned weights of one layer, [out, in].

        Args:
            weight: float32 [out, in].
            group: the layer's linear group, with its Hessian.
        """
        raise NotImplementedError

    def masked(self, weight: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the weights with zeros instead of those with the smallest scores.

        Args:
            weight: [out, in].
            scores: [out, in], at least 0; compared within a row, or within every m of it.
        """
        if self.n_of_m:
            kept = n_of_m_kept(scores, *self.n_of_m)
        else:
            kept = largest_kept(scores, self.sparsity)
        return weight.masked_fill(~kept, 0)


class MagnitudeMethod(SparsityMethod):
    """The smallest weights of a layer, or of every m, go."""

    needs_hessian = False

    def prune(self, weight: torch.Tensor, group: LinearGroup) -> torch.Tensor:
        if self.n_of_m:
            return self.masked(weight, weight.abs())
        # the whole layer as one row
        return self.masked(weight.view(1, -1), weight.abs().view(1, -1)).view_as(weight)


class WandaMethod(SparsityMethod):
    """The weights with the smallest share in their row's output go."""

    def prune(self, weight: torch.Tensor, group: LinearGroup) -> torch.Tensor:
        return self.masked(weight, weight.abs() * group.hessian.diagonal().sqrt())


class SparseGPTMethod(SparsityMethod):
    """The cheapest weights go, and the others of their row make up for them."""

    only_zeros = False

    def __init__(self, stage: SparseGPT, source: Checkpoint):
        super().__init__(stage, source)
        self.damping = stage.damping

    def prune(self, weight: torch.Tensor, group: LinearGroup) -> torch.Tensor:
        return sparsegpt(weight, group.hessian, self.damping, self.sparsity, self.n_of_m)


@dataclass(kw_only=True)
class WeightPruning(Stage):
    """Settings and steps of every method.

    Attributes:
        sparsity: share of the weights that become zero, between 0 and 1; None: 0.5, or what ``n``
            and ``m`` give.
        n: of every ``m`` successive inputs of a row so many weights stay (2:4 and 4:8 are what
            hardware knows), 1 to m - 1; None: zeros anywhere.
        m: 2 to 256, and a divisor of every layer's inputs; None: zeros anywhere.
    """

    sparsity: float | None = None
    n: int | None = None
    m: int | None = None

    kind: ClassVar[str] = "prune"
    criterion: ClassVar[str]  # name in metadata and pictures
    method: ClassVar[type[SparsityMethod]]

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            calibrated.require_share(
                "pruner.sparsity", self.sparsity, 0.5, "the share of weights that become zero"
            )
        if (self.n is None) != (self.m is None):
            raise SlimError(
                "pruner.n and pruner.m belong together: n of every m weights stay, for example "
                "pruner.n=2 pruner.m=4."
            )
        if self.n is not None:
            self._check_n_of_m()

    def _check_n_of_m(self) -> None:
        require_number("pruner.m", self.m, 2, 256, integer=True)
        require_number("pruner.n", self.n, 1, integer=True)
        if self.n >= self.m:
            raise SlimError(
                f"pruner.n={self.n} of every pruner.m={self.m} weights are to stay, so none would "
                f"go. n must be smaller than m, from 1 to {self.m - 1}."
            )
        if self.sparsity is not None and abs(self.sparsity - self.share) > 1e-9:
            raise SlimError(
                f"pruner.n={self.n} pruner.m={self.m} gives a sparsity of "
                f"{1 - self.n / self.m:g}, but pruner.sparsity={self.sparsity}. "
                "Leave pruner.sparsity out."
            )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """The pattern, or None for zeros anywhere."""
        return None if self.n is None else (self.n, self.m)

    @property
    def share(self) -> float:
        """The share of weights that go."""
        if self.n is not None:
            return 1 - self.n / self.m
        return 0.5 if self.sparsity is None else self.sparsity

    def cache_key(self) -> dict:
        return {**dataclass_cache_key(self), "sparsity": self.share}

    def check(self, spec: ModelSpec) -> None:
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        spec.require_plain("Prune first, quantize afterwards.")
        if self.m is None:
            return
        for block in range(spec.blocks):
            for name, (_, columns) in spec.block_linears(block).items():
                if columns % self.m:
                    raise SlimError(
                        f"pruner.m={self.m} does not divide the {columns} inputs of {name} in "
                        f"block {block} of {spec.name}. Use one that does, such as 4."
                    )

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        largest = max(rows * columns for rows, columns in spec.block_linears().values())
        block = 2 * 4 * spec.block_parameters() + 4 * 4 * largest
        return calibrated.LIBRARY_BYTES + block + calibrated.shard_bytes(spec)

    def tokens(self, source: Checkpoint) -> torch.Tensor | None:
        """Return calibration tokens, int64 [samples, length], or None for a method without
        calibration."""
        return None

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        method = self.method(self, checkpoint)
        errors = transform_checkpoint(
            checkpoint, target, method, spec.config, context, self.tokens(checkpoint)
        )
        zeros = sum(layer["zeros"] for layer in method.zeros)
        check_zeros(checkpoint, open_checkpoint(target), zeros, method.only_zeros)
        say(NOTE)
        # imports matplotlib
        from slim.pruning.weights_report import write_report

        write_report(target, self.criterion, self.share, method.zeros, errors)
        return self._metadata(spec, method, errors)

    def _metadata(self, spec: ModelSpec, method: SparsityMethod, errors: list[LayerError]) -> dict:
        """Return what the manifest says of the result."""
        zeros = sum(layer["zeros"] for layer in method.zeros)
        weights = sum(layer["weights"] for layer in method.zeros)
        return {
            "criterion": self.criterion,
            "sparsity": zeros / weights,
            "sparsity_of_all_parameters": zeros / spec.parameters(),
            "mask": {"kind": "n:m" if self.n else "unstructured", "n": self.n, "m": self.m},
            "layer_error_mean": sum(layer.error for layer in errors) / len(errors),
            "layer_error_max": max(layer.error for layer in errors),
            "note": NOTE,
        }


@dataclass(kw_only=True)
class MagnitudeWeights(WeightPruning):
    """``pruner=magnitude_weights``. Settings: see :class:`WeightPruning`."""

    cache_name: ClassVar[str] = "MagnitudeWeights"

    criterion: ClassVar[str] = "magnitude"
    method: ClassVar[type[SparsityMethod]] = MagnitudeMethod


@dataclass(kw_only=True)
class CalibratedWeightPruning(WeightPruning):
    """A method that looks at calibration samples.

    Attributes:
        calibration: the text they are taken from.
    """

    calibration: Calibration

    version: ClassVar[int] = 2

    def tokens(self, source: Checkpoint) -> torch.Tensor:
        return self.calibration.tokens_for(source)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        length = min(self.calibration.length, spec.context_length)
        return super().peak_bytes(spec, device) + calibration_bytes(
            spec, self.calibration.samples, length
        )


@dataclass(kw_only=True)
class Wanda(CalibratedWeightPruning):
    """``pruner=wanda``. Settings: see :class:`CalibratedWeightPruning`."""

    cache_name: ClassVar[str] = "Wanda"

    criterion: ClassVar[str] = "wanda"
    method: ClassVar[type[SparsityMethod]] = WandaMethod


@dataclass(kw_only=True)
class SparseGPT(CalibratedWeightPruning):
    """``pruner=sparsegpt``. Other settings: see :class:`CalibratedWeightPruning`.

    Attributes:
        damping: ridge of the update, above 0, in means of the Hessian's diagonal.
    """

    cache_name: ClassVar[str] = "SparseGPT"

    damping: float = 0.01

    criterion: ClassVar[str] = "sparsegpt"
    method: ClassVar[type[SparsityMethod]] = SparseGPTMethod

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("pruner.damping", self.damping, 1e-9)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        widest = max(columns for _, columns in spec.block_linears().values())
        return super().peak_bytes(spec, device) + 3 * 8 * widest**2
