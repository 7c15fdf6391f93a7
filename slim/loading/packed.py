"""Loading a packed checkpoint for use: the model's own class, its quantised layers as
``QuantLinear``."""

from __future__ import annotations

import torch
from torch import nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel
from slim.checkpoints.reader import TensorReader
from slim.core.errors import SlimError
from slim.loading.generation import load_generation_config
from slim.quantization.formats import Stored, read_config
from slim.quantization.formats.base import read_tensor
from slim.quantization.kernels.linear import QuantEmbedding, QuantLinear
from slim.quantization.scheme import Scheme


def load_quantized(
    checkpoint: Checkpoint, dtype: str, device: str = "cpu", kernels: bool = True
) -> nn.Module:
    """Load a packed checkpoint in any format of docs/formats.md, in evaluation mode.

    Weights are read tensor by tensor; no dense copy of a quantized layer is made.

    Args:
        checkpoint: Slim's own or another tool's.
        dtype: Type of activations, scales and plain weights, such as ``"bfloat16"``.
        device: ``"cpu"`` or ``"cuda"``.
        kernels: Whether to bring the codes into the layouts of the fastest kernels; not all of
            these have gradients.

    Raises:
        SlimError: The format is another one, or tensors are missing or do not fit the config.
    """
    stored = read_config(checkpoint.spec.quantization, str(checkpoint.folder))
    meta_model = MetaModel(checkpoint, device)
    model, wanted = meta_model.model, getattr(torch, dtype)
    tied_head = model.get_output_embeddings() if checkpoint.spec.tied else None
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scheme = packed_scheme(stored, meta_model.reader, name, optional=module is tied_head)
            if scheme is not None:
                layer = read_layer(
                    meta_model.reader, stored, name, module, scheme, wanted, device, kernels
                )
                model.set_submodule(name, layer)
    load_plain(model, meta_model.reader, wanted, device)
    tie(model, checkpoint.spec.tied, device)
    require_all(model, meta_model.reader)
    model.config.dtype = wanted
    load_generation_config(model, checkpoint)
    return model.eval()


def load(checkpoint: Checkpoint, dtype: str, device: str, trainable: bool) -> nn.Module:
    """Load a packed checkpoint.

    Args:
        checkpoint: What to load.
        dtype: Type of activations, scales and plain weights, such as ``"bfloat16"``.
        device: ``"cpu"`` or ``"cuda"``.
        trainable: Whether to keep the layouts that gradients can pass.
    """
    return load_quantized(checkpoint, dtype, device, kernels=not trainable)


def use_fast_kernels(model: nn.Module) -> bool:
    """Let the layers of a model loaded in float32 use the kernels of bfloat16 on a CPU.

    Fast for single tokens, with rounded activations and scales: nothing but the measuring of speed
    should ask for it. Loaded in bfloat16, layers have the fastest kernels already.

    Returns:
        Whether any layer of ``model`` now uses another kernel.
    """
    changed = False
    for module in model.modules():
        if not isinstance(module, QuantLinear) or module.kernel is not None:
            continue
        if module.packed.device.type == "cpu":
            changed |= module.choose_kernel(mixed=True).kernel is not None
    return changed


def packed_scheme(stored: Stored, reader: TensorReader, name: str, optional: bool) -> Scheme | None:
    """Return the scheme of a layer that the file holds packed; None: it is plain.

    Args:
        stored: How the checkpoint is quantized.
        reader: On the checkpoint.
        name: The layer's full name.
        optional: Whether the file may hold neither, as for a head that shares the embedding.

    Raises:
        SlimError: The config and the file say different things.
    """
    scheme, codes = stored.scheme(name), f"{name}.{stored.format.codes}"
    if codes in reader and scheme is None and f"{name}.weight" not in reader:
        raise SlimError(
            f"{reader.checkpoint.folder} holds '{codes}', "
            f"but its quantization_config says that {name} is plain. "
            "The config does not belong to these weights."
        )
    if codes in reader:
        return scheme
    if scheme is not None and f"{name}.weight" not in reader and not optional:
        raise SlimError(
            f"{reader.checkpoint.folder} has no tensor '{codes}', which its quantization_config "
            f"({stored.format.quant_method}) asks for."
        )
    return None


def read_layer(
    reader: TensorReader,
    stored: Stored,
    name: str,
    module: nn.Linear | nn.Embedding,
    scheme: Scheme,
    dtype: torch.dtype,
    device: str,
    kernels: bool = True,
) -> QuantLinear | QuantEmbedding:
    """Read one packed layer.

    Args:
        reader: On the checkpoint.
        stored: How the checkpoint is quantized.
        name: The layer's full name.
        module: The layer that it takes the place of, whose weight is [out, in].
        scheme: Its scheme.
        dtype: Type of activations and scales.
        device: Where to put it.
        kernels: Whether to choose the fastest kernel's layout.

    Raises:
        SlimError: Its tensors do not have the shapes of its place in the model.
    """
    rows, columns = module.weight.shape
    bias = getattr(module, "bias", None) is not None
    layer = QuantLinear(columns, rows, scheme, dtype, bias)
    layer.take(stored.format.read(reader, name, columns, rows, scheme, stored))
    if bias:
        layer.bias = read_tensor(reader, f"{name}.bias", (rows,)).to(dtype)
    layer = layer.to(device)
    if isinstance(module, nn.Embedding):  # rows are looked up in the stored stream
        return QuantEmbedding(layer, getattr(module, "embed_scale", None))
    if not kernels:
        return layer
    return layer.choose_kernel()


def load_plain(model: nn.Module, reader: TensorReader, dtype: torch.dtype, device: str) -> None:
    """Load everything that is not packed (embeddings, norms, head).

    Args:
        model: The model, its plain parameters on the meta device.
        reader: On the checkpoint.
        dtype: Type to load in.
        device: Where to put them.
    """
    for name, parameter in list(model.named_parameters()):
        if name in reader:
            module, _, attribute = name.rpartition(".")
            tensor = read_tensor(reader, name, parameter.shape)
            setattr(
                model.get_submodule(module),
                attribute,
                nn.Parameter(tensor.to(device, dtype), requires_grad=False),
            )


def tie(model: nn.Module, tied: bool, device: str) -> None:
    """Let the head share the embedding where the file holds no packed head of its own.

    Args:
        model: The model, its embedding loaded.
        tied: Whether the config says that they are shared.
        device: ``"cpu"`` or ``"cuda"``.
    """
    embedding = model.get_input_embeddings()
    if not tied or isinstance(model.get_output_embeddings(), QuantLinear):
        return
    if model.get_output_embeddings() is None:  # an encoder
        return
    if not isinstance(embedding, QuantEmbedding):
        model.tie_weights()
        return
    if device == "cpu":  # rows can be looked up in the CPU kernels' layouts, not in that of CUDA
        embedding.table.choose_kernel()
    model.set_output_embeddings(embedding.table)


def require_all(model: nn.Module, reader: TensorReader) -> None:
    """Check that every weight of the model was in the file.

    Args:
        model: The model after loading.
        reader: On the checkpoint.

    Raises:
        SlimError: One was not.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise SlimError(
            f"{reader.checkpoint.folder} lacks {len(empty)} weights its config asks for, "
            f"first '{empty[0]}'."
        )
