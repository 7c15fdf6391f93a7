"""Loading a packed checkpoint for use: the model's own class, its quantised linear layers as ``QuantLinear``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from slim.blockwise import Skeleton
from slim.checkpoint import Checkpoint, TensorReader
from slim.errors import SlimError
from slim.quantization.linear import QuantLinear
from slim.quantization.packing import unpack_columns
from slim.quantization.scheme import Scheme, from_config


def load_quantized(checkpoint: Checkpoint, dtype: str, device: str = "cpu") -> nn.Module:
    """Load a compressed-tensors ``pack-quantized`` checkpoint, slim's own or another tool's, in evaluation mode.

    dtype: type of activations, scales and plain weights, such as ``"bfloat16"``. Weights are read tensor by tensor;
    no dense copy of a quantised layer is made. Raises ``SlimError`` for other formats and for missing tensors.
    """
    scheme = from_config(checkpoint.description.quantization, str(checkpoint.folder))
    skeleton = Skeleton(checkpoint, device)
    model, wanted = skeleton.model, getattr(torch, dtype)
    ignored = checkpoint.description.quantization.get("ignore") or []
    for name, linear in list(quantised_linears(model, ignored, skeleton.reader)):
        model.set_submodule(name, read_linear(skeleton.reader, name, linear, scheme, wanted, device))
    load_plain(model, skeleton.reader, wanted, device)
    model.config.dtype = wanted
    load_generation_config(model, checkpoint)
    return model.eval()


def quantised_linears(model: nn.Module, ignored: list[str], reader: TensorReader) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, layer) of the linear layers that the file holds packed.

    Raises ``SlimError`` for a layer that is neither packed, nor plain, nor shares the embedding.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or is_ignored(name, ignored):
            continue
        if f"{name}.weight_packed" in reader:
            yield name, module
        elif f"{name}.weight" not in reader and module is not model.get_output_embeddings():
            raise SlimError(f"{reader.checkpoint.folder} has no tensor '{name}.weight_packed'.")


def is_ignored(name: str, ignored: list[str]) -> bool:
    """Whether a layer is on the ignore list: exact names, or patterns after ``re:``."""
    return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in ignored)


def read_linear(
    reader: TensorReader, name: str, linear: nn.Linear, scheme: Scheme, dtype: torch.dtype, device: str
) -> QuantLinear:
    """Read one packed layer. Raises ``SlimError`` if its tensors do not have the shapes of its place in the model."""
    layer = QuantLinear(linear.in_features, linear.out_features, scheme, dtype, linear.bias is not None)
    found = {
        "packed": reader.read(f"{name}.weight_packed"),
        "scale": reader.read(f"{name}.weight_scale"),
    }
    if not scheme.symmetric:
        found["zero"] = unpack_columns(reader.read(f"{name}.weight_zero_point"), scheme.bits, linear.out_features)
    if linear.bias is not None:
        found["bias"] = reader.read(f"{name}.bias").to(dtype)
    for key, tensor in found.items():
        expected = getattr(layer, key).shape
        if tensor.shape != expected:
            raise SlimError(
                f"{name} in {reader.checkpoint.folder}: {key} is {tuple(tensor.shape)}, not {tuple(expected)}."
            )
        layer.take_scale(tensor) if key == "scale" else setattr(layer, key, tensor)
    return layer.to(device).choose_kernel()


def load_plain(model: nn.Module, reader: TensorReader, dtype: torch.dtype, device: str) -> None:
    """Load everything that is not packed (embeddings, norms, head) and tie what the model ties."""
    for name, parameter in list(model.named_parameters()):
        if name in reader:
            module, _, attribute = name.rpartition(".")
            tensor = reader.read(name)
            if tensor.shape != parameter.shape:
                raise SlimError(
                    f"{name} in {reader.checkpoint.folder} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}."
                )
            setattr(model.get_submodule(module), attribute, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    model.tie_weights()
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise SlimError(
            f"{reader.checkpoint.folder} lacks {len(empty)} weights its config asks for, first '{empty[0]}'."
        )


def load_generation_config(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the model the generation settings of its folder."""
    if (checkpoint.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
