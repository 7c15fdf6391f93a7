"""An adapter of PEFT's own, merged into the model it was trained on: the first step of a chain with
``model.adapter=FOLDER``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from slim.checkpoints.stage import Context, Stage
from slim.core.errors import SlimError
from slim.core.io import read_header, read_object, sha256
from slim.core.settings import cache_name
from slim.models.spec import ModelSpec
from slim.quantization.storage import weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

PROBE = 12  # tokens
TOLERANCE = 1e-3  # of the logits: products are added up in another order
SHARED = ("embed_tokens", "lm_head")  # modules that may have their weights in common


@dataclass
class MergeAdapter(Stage):
    """Adds an adapter's products to the weights they belong to.

    Attributes:
        adapter: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT
            writes it.
    """

    cache_name: ClassVar[str] = "Adapter"
    kind: ClassVar[str] = "merge"

    adapter: str

    def __post_init__(self) -> None:
        folder = self.folder
        if not (folder / ADAPTER_CONFIG).is_file():
            raise SlimError(
                f"model.adapter={self.adapter}: there is no {ADAPTER_CONFIG} in it. Give a folder "
                "that PEFT wrote with save_pretrained."
            )
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise SlimError(
                f"model.adapter={self.adapter} lacks {ADAPTER_WEIGHTS}. Save the adapter as "
                "safetensors: model.save_pretrained(folder) does."
            )
        kind = read_object(folder / ADAPTER_CONFIG).get("peft_type")
        if kind != "LORA":
            raise SlimError(
                f"model.adapter={self.adapter} is of peft_type={kind}; slim merges LORA. Merge it "
                "with PEFT (merge_and_unload) and give the result as model.source."
            )
        read_header(folder / ADAPTER_WEIGHTS)

    @property
    def folder(self) -> Path:
        """Where the adapter is."""
        return Path(self.adapter).expanduser()

    def cache_key(self) -> dict:
        names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        return {"class": cache_name(self), **{n: sha256(self.folder / n) for n in names}}

    def check(self, spec: ModelSpec) -> None:
        spec.require_plain("Merge the adapter into the plain weights, and quantize the result.")

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return weight_bytes(spec, "float32") + (self.folder / ADAPTER_WEIGHTS).stat().st_size

    def run(self, source: Path, target: Path, context: Context) -> dict:
        """Write the merged model.

        Returns:
            ``adapter_parameters``: how many numbers the adapter has.

        Raises:
            SlimError: The adapter does not belong to this model.
        """
        from slim.loading.load_model import load_model
        from slim.loading.save_model import save_model

        checkpoint = open_checkpoint(source)
        self.check(checkpoint.spec)
        merged, count = self.merge(load_model(source, "float32", context.device))
        save_model(merged, source, target)
        return {"adapter_parameters": count}

    def merge(self, model: nn.Module) -> tuple[nn.Module, int]:
        """Return a plain model with the adapter's products added, and the adapter's size.

        Args:
            model: The model the adapter was trained on, float32.
        """
        from safetensors.torch import load_file

        from slim.loading.adapters import import_peft, quiet_peft

        peft = import_peft("model.adapter")
        state = load_file(self.folder / ADAPTER_WEIGHTS)
        self._require_finite(state)
        if any(part in name.split(".") for name in state for part in SHARED):
            untie(model)
        try:
            with quiet_peft():
                config = peft.LoraConfig.from_pretrained(str(self.folder))
                wrapped = peft.get_peft_model(model, config)
                loaded = peft.set_peft_model_state_dict(wrapped, state)
        except Exception as error:  # PEFT checks settings and shapes in its own ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SlimError(
                f"model.adapter={self.adapter} does not fit its model: {reason}"
            ) from error
        missing = []
        for name in loaded.missing_keys:
            if "lora_" in name or "modules_to_save" in name:
                missing.append(name)
        if missing or loaded.unexpected_keys:
            names = missing or list(loaded.unexpected_keys)
            raise SlimError(
                f"model.adapter={self.adapter} does not belong to its model: {names[0]} is "
                f"{'missing in the adapter' if missing else 'not in the model'}."
            )
        size = sum(part.numel() for part in state.values())
        return self._merged(wrapped.eval()).requires_grad_(False), size

    def _require_finite(self, state: dict[str, torch.Tensor]) -> None:
        """Raise ``SlimError`` for an adapter that holds NaN or infinity."""
        import torch

        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise SlimError(
                    f"model.adapter={self.adapter}: {name} contains NaN or infinity. The training "
                    "of the adapter failed; give another one."
                )

    def _merged(self, wrapped: nn.Module) -> nn.Module:
        """Merge the adapter's products, and compare what both models compute."""
        import torch

        # tokens of any vocabulary
        probe = torch.arange(PROBE, device=wrapped.device)[None]
        with torch.no_grad():
            before = wrapped(input_ids=probe, use_cache=False).logits
            merged = wrapped.merge_and_unload().eval()
            after = merged(input_ids=probe, use_cache=False).logits
        if not (after - before).norm() <= TOLERANCE * before.norm():
            raise SlimError(
                f"model.adapter={self.adapter}: with the adapter merged the model computes "
                "something else than with the adapter applied. It is not merged.\n"
                "Merge it with the library that trained it, and give the result as model.source."
            )
        return merged


def untie(model: nn.Module) -> None:
    """Give a model whose head shares the embedding's weights a head of its own, if it is one.

    An adapter on one of them would otherwise change both.

    Args:
        model: Of transformers, changed in place.
    """
    from torch import nn

    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
