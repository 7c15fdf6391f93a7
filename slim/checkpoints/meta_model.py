"""A model without weights: modules on torch's meta device, into which single parts are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.spec import Family

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


FINITE_AT_ONCE = 2**20  # numbers looked at together: the check makes several copies of them


class MetaModel:
    """The model without weights: modules on torch's meta device, into which single parts are
    loaded."""

    def __init__(self, source: Checkpoint, device: str = "cpu"):
        self.spec, self.device = source.spec, device
        self.family: Family = self.spec.family
        self.reader = TensorReader(source)
        self.model = empty_model(source)
        self.blocks = self.model.get_submodule(self.family.blocks)
        for module in self.model.modules():
            self._restore_buffers(module)

    def _restore_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no file holds, such as rotary frequencies, as transformers itself
        does."""
        missing = [
            name for name in module._non_persistent_buffers_set if getattr(module, name).is_meta
        ]
        for name in missing:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if missing:
            self.model._init_weights(module)
            for name in missing:
                setattr(module, name, getattr(module, name).to(self.device))

    def load(self, name: str) -> nn.Module:
        """Load the weights of one module as float32 and return it. Raises ``SlimError`` for bad or
        missing ones."""
        module = self.model.get_submodule(name)
        tensors = {}
        for key, tensor in self.reader.read_module(name):
            tensors[key] = (
                tensor.to(self.device, torch.float32) if tensor.is_floating_point() else tensor
            )
            if not all(
                torch.isfinite(part).all() for part in tensors[key].flatten().split(FINITE_AT_ONCE)
            ):
                raise SlimError(
                    f"The weights {name}.{key} contain NaN or infinity: the model is damaged."
                )
        try:
            missing = module.load_state_dict(tensors, strict=False, assign=True).missing_keys
        except RuntimeError as error:  # torch lists every tensor whose shape does not fit
            reason = str(error).splitlines()[1].strip()
            raise SlimError(f"The weights of {name} do not fit config.json: {reason}") from error
        self.reader.release()
        if missing:
            raise SlimError(
                f"{self.spec.name} has no tensor '{name}.{missing[0]}', which its config asks for."
            )
        return module

    def drop(self, name: str) -> None:
        """Free the weights of one module."""
        self.model.get_submodule(name).to("meta")
        self.reader.release()


def empty_model(source: Checkpoint) -> nn.Module:
    """Return the checkpoint's model with all tensors on the meta device, in evaluation mode; no
    quantisation in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )


def stored_dtype(name: str) -> torch.dtype:
    """Return the torch type for safetensors' name of it."""
    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }[name]
