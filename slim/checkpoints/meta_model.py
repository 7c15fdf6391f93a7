"""A model without weights: modules on torch's meta device, into which single parts are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader, stored_dtype
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.encoders import BODY, CLASSES, MASKED
from slim.models.spec import Family, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig
else:
    torch = LazyModule("torch")

__all__ = ["MetaModel", "empty_model", "model_config", "stored_dtype"]

FINITE_AT_ONCE = 2**20  # numbers looked at together: the check makes several copies of them


class MetaModel:
    """The model without weights: modules on torch's meta device, into which single parts are
    loaded.

    Args:
        source: The checkpoint.
        device: Where parts are loaded to.
    """

    def __init__(self, source: Checkpoint, device: str = "cpu"):
        self.spec = source.spec
        self.device = device
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
            if tensor.is_floating_point():
                tensor = tensor.to(self.device, torch.float32)
            tensors[key] = tensor
            if not is_finite(tensor):
                raise SlimError(
                    f"The weights {name}.{key} contain NaN or infinity: the model is damaged."
                )
        try:
            missing = module.load_state_dict(tensors, strict=False, assign=True).missing_keys
        except RuntimeError as error:  # torch lists every tensor whose shape does not fit
            reason = str(error).splitlines()[1].strip()
            raise SlimError(f"The weights of {name} do not fit config.json: {reason}") from error
        self.reader.release()
        # strict=False above, so that the message can name the tensor in the checkpoint's words
        if missing:
            raise SlimError(
                f"{self.spec.name} has no tensor '{name}.{missing[0]}', which its config asks for."
            )
        return module

    def drop(self, name: str) -> None:
        """Free the weights of one module."""
        self.model.get_submodule(name).to("meta")
        self.reader.release()


def model_config(source: Checkpoint) -> PreTrainedConfig:
    """Return the configuration of transformers for a checkpoint, quantization left out.

    Raises:
        SlimError: ``config.json`` has an entry that transformers refuses.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        if source.is_plain or source.config.get("model_type") not in CONFIG_MAPPING:
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        else:
            config = CONFIG_MAPPING[source.config["model_type"]].from_dict(dict(source.config))
    except Exception as error:  # every class checks its entries in its own way
        raise refused_entry(source, error) from error
    # with it transformers would build packed layers, which slim reads by itself
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def auto_class(spec: ModelSpec) -> type:
    """Return the class of transformers that builds a model by its config: of language models, or
    for an encoder of what stands on top of it.

    Args:
        spec: The model.
    """
    import transformers

    names = {
        None: "AutoModelForCausalLM",
        BODY: "AutoModel",
        CLASSES: "AutoModelForSequenceClassification",
        MASKED: "AutoModelForMaskedLM",
    }
    return getattr(transformers, names[spec.top])


def empty_model(source: Checkpoint) -> nn.Module:
    """Return the checkpoint's model with all tensors on the meta device, in evaluation mode; no
    quantization in it.

    Raises:
        SlimError: ``config.json`` has an entry that the model's class cannot be built with.
    """
    config = model_config(source)
    try:
        with torch.device("meta"):
            model = auto_class(source.spec).from_config(config, dtype=torch.float32)
    except Exception as error:  # see model_config
        raise refused_entry(source, error) from error
    return model.eval().requires_grad_(False)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor (of any shape) holds neither NaN nor infinity."""
    # in parts: a mask as large as an embedding is memory that nobody has planned
    parts = tensor.flatten().split(FINITE_AT_ONCE)
    return all(torch.isfinite(part).all() for part in parts)


def refused_entry(source: Checkpoint, error: Exception) -> SlimError:
    """Return the error for a config that transformers refuses, naming the entry where the
    library's message tells it.

    Args:
        source: The checkpoint.
        error: What transformers raised.
    """
    file, text = source.folder / "config.json", str(error)
    reason = " ".join(line.strip() for line in text.splitlines() if line.strip())[:300]
    for path, value in entries(source.config):
        key = path.split(".")[-1]
        named = re.search(rf"\b{re.escape(key)}\b", text) and len(key) > 4
        quoted = isinstance(value, str) and len(value) > 2 and value in text
        if quoted and value != source.config.get("model_type") or named:
            shown = json.dumps(value, ensure_ascii=False)
            return SlimError(
                f"{file}: transformers refuses {path}={shown} ({type(error).__name__}: {reason}).\n"
                "Set the entry to a value that it knows, or remove it."
            )
    return SlimError(
        f"{file}: transformers cannot build this model ({type(error).__name__}: {reason})."
    )


def entries(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (path, value) of all entries of a config, those of inner objects first.

    Args:
        config: A parsed ``config.json``, or an object in it.
        prefix: Stands in front of every path.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{key}.")
        yield f"{prefix}{key}", value
