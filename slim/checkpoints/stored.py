"""Tensors as files hold them, and under the names and shapes the model gives them.

Everything that reads a checkpoint sees the same tensors: wrappers' prefixes are taken off the
names, tables that the model computes itself and a second copy of a shared matrix are left out, rows
beyond the vocabulary are cut, and float8 weights are read with their scales."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from slim.core.errors import SlimError
from slim.core.io import read_header, same_data
from slim.models.encoders import family_of
from slim.models.families import Family

# in front of all names: of DataParallel, PEFT, models of several parts
WRAPPERS = ("module.", "base_model.model.", "language_model.")
# names of modules that wrappers put in between
INFIXES = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# what models compute for themselves and older files hold
COMPUTED = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|embeddings\.(?:position_ids|token_type_ids))$"
)
FLOAT8 = ("F8_E4M3", "F8_E5M2")
# ends of the names of a float8 weight's scales, which it is multiplied by in spite of "inv"
SCALES = ("weight_scale_inv", "weight_scale")
# ends of scales of activations, which plain activations do not need
ACTIVATION_SCALES = ("input_scale", "activation_scale", "output_scale", "input_scale_ub")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: Name of the file in the checkpoint folder.
        name: Its name there.
        dtype: safetensors' name of its type, such as ``"BF16"``.
        shape: Its shape there.
        rows: How many of its rows belong to the model; None: all.
        scale: The scales of a float8 weight; None: it is what it says.
        read_as: safetensors' name of the type it is read as; None: ``dtype``.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: int | None = None
    scale: StoredTensor | None = None
    read_as: str | None = None

    @property
    def entry(self) -> tuple[str, str, tuple[int, ...]]:
        """File, type and shape as those who read it see them."""
        shape = self.shape
        if self.rows is not None:
            shape = (self.rows, *self.shape[1:])
        return self.file, self.read_as or self.dtype, shape

    @property
    def changed(self) -> bool:
        """Whether reading it gives anything else than what the file holds."""
        return self.rows is not None or self.read_as is not None


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Return name -> tensor of all weight files, as they are.

    Raises:
        SlimError: Two files hold a tensor of the same name, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in tensors:
                raise SlimError(
                    f"{path.parent} holds the tensor '{name}' twice, in {tensors[name].file} and "
                    f"{path.name}. Keep one of them."
                )
            tensors[name] = StoredTensor(path.name, name, entry["dtype"], tuple(entry["shape"]))
    return tensors


def normalize(
    tensors: dict[str, StoredTensor], config: dict, folder: Path
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Give tensors the names, shapes and types that the model's class asks for.

    Args:
        tensors: Those of the files, by the names they have there.
        config: The parsed ``config.json``; ``tie_word_embeddings`` and ``dtype`` are heeded.
        folder: The checkpoint folder, for messages and for comparing the head with the embedding.

    Returns:
        Name -> tensor as the model knows it, and a sentence for each thing that was left out or
        changed.

    Raises:
        SlimError: Two tensors get the same name, or the scales of a float8 weight are missing.
    """
    notes: list[str] = []
    family = family_of(config)
    tensors = _renamed(tensors, family, folder, notes)
    for name in list(tensors):
        if COMPUTED.search(name):  # the model's class computes it, whatever the file holds
            del tensors[name]
    tensors = _with_scales(tensors, config, folder, notes)
    if family is not None:
        tensors = _cut_vocabulary(tensors, config, family, notes)
    return tensors, notes


def _renamed(
    tensors: dict[str, StoredTensor], family: Family | None, folder: Path, notes: list[str]
) -> dict[str, StoredTensor]:
    """Take wrappers' prefixes off, and put the base model's prefix on where all names lack it."""
    names = canonical_names(list(tensors), family)
    renamed: dict[str, StoredTensor] = {}
    for old, new in zip(tensors, names, strict=True):
        if new in renamed:
            raise SlimError(
                f"{folder} holds '{renamed[new].name}' and '{old}', both of which are '{new}'. "
                "Keep one of them."
            )
        renamed[new] = tensors[old]
    for name, tensor in renamed.items():
        if name != tensor.name:  # one example is enough: they have the prefix in common
            notes.append(f"Names: '{tensor.name}' is read as '{name}', and so on.")
            break
    return renamed


def canonical_names(names: list[str], family: Family | None) -> list[str]:
    """Return the names the model's class has for these tensors, in their order.

    Args:
        names: All names of a checkpoint.
        family: Its family; None leaves the base model's prefix as it is.
    """
    names = without_wrappers([INFIXES.sub("", name) for name in names])
    if family is None:
        return names
    base, _, blocks = family.blocks.partition(".")  # "model" and "layers"
    # the head stands outside the base model, so it tells nothing of a prefix
    inside = [name for name in names if name.split(".")[0] != family.head]
    prefix = _before_blocks(inside, base, blocks)
    if prefix and _all_begin(inside, prefix):  # a wrapper's, or "model.language_model."
        names = [name.removeprefix(prefix) for name in names]
    if _any_begins(names, f"{base}."):
        return names
    if _any_begins(names, f"{blocks}."):  # saved from the base model alone, without a head
        for index, name in enumerate(names):
            if name.split(".")[0] != family.head:
                names[index] = f"{base}.{name}"
    return names


def _before_blocks(names: list[str], base: str, blocks: str) -> str:
    """Return what stands in front of the base model in the first name of a block's tensor."""
    place = re.compile(rf"(?:^|(?<=\.))(?:{base}\.)?{blocks}\.\d+\.")
    for name in names:
        match = place.search(name)
        if match:
            return name[: match.start()]
    return ""


def without_wrappers(names: list[str]) -> list[str]:
    """Take off what all names have in front of them.

    Args:
        names: All names of a checkpoint.
    """
    for prefix in WRAPPERS * 2:  # one wrapper may stand in another
        if _all_begin(names, prefix):
            names = [name.removeprefix(prefix) for name in names]
    return names


def _all_begin(names: list[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _any_begins(names: list[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _with_scales(
    tensors: dict[str, StoredTensor], config: dict, folder: Path, notes: list[str]
) -> dict[str, StoredTensor]:
    """Join float8 weights with their scales; without any they are read as the numbers they are."""
    packed = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8]
    if not packed:
        return tensors
    wanted = {"float32": "F32", "float16": "F16"}.get(plain_dtype(config), "BF16")
    joined = {}
    for name, tensor in tensors.items():
        # scales are no tensors of the model; those of activations are of no use for plain weights
        if not name.endswith((*SCALES, *ACTIVATION_SCALES)):
            joined[name] = tensor
    has_scales = len(joined) < len(tensors)
    how = "as the numbers they are: there are no scales"
    for name in packed:
        scale = _scale_of(name, tensors)
        if scale is not None:
            how = "by their scales"
        elif has_scales and name.endswith(".weight"):
            # a file is missing or damaged: without its scale the weight is off by orders
            module = name.removesuffix(".weight")
            raise SlimError(
                f"{folder}: '{name}' is {tensors[name].dtype} without a scale ('{module}."
                f"{SCALES[0]}' or '{module}.{SCALES[1]}'), though others have one."
            )
        joined[name] = replace(tensors[name], scale=scale, read_as=wanted)
    notes.append(f"{len(packed)} weights are stored in float8; they are read as {wanted}, {how}.")
    return joined


def _scale_of(name: str, tensors: dict[str, StoredTensor]) -> StoredTensor | None:
    """Return the scale that lies next to a float8 weight, by the names that other tools use."""
    module = name.removesuffix(".weight")
    for end in SCALES:
        if f"{module}.{end}" in tensors:
            return tensors[f"{module}.{end}"]
    return None


def plain_dtype(config: dict) -> str:
    """Return the type that a config names, without ``torch.``; ``""`` where it names none."""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _cut_vocabulary(
    tensors: dict[str, StoredTensor], config: dict, family: Family, notes: list[str]
) -> dict[str, StoredTensor]:
    """Leave out the rows of embedding and head that lie beyond the config's vocabulary."""
    rows = config.get("vocab_size")
    cut = dict(tensors)
    if not isinstance(rows, int):  # refused when the spec is made
        return cut
    for name in (f"{family.embeddings}.weight", f"{family.head}.weight"):
        tensor = tensors.get(name)
        plain = tensor is not None and len(tensor.shape) == 2
        if plain and tensor.shape[1] == config.get("hidden_size") and tensor.shape[0] > rows:
            cut[name] = replace(tensor, rows=rows)
            notes.append(
                f"{name} has {tensor.shape[0]} rows, config.json says vocab_size={rows}: the last "
                f"{tensor.shape[0] - rows} are left out."
            )
    return cut


def equal_contents(folder: Path, first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, as bytes.

    Args:
        folder: The checkpoint folder.
        first: A tensor in one of its files.
        second: Another one.
    """
    # the headers first: comparing the bytes of an embedding reads gigabytes
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return same_data(folder / first.file, first.name, folder / second.file, second.name)
