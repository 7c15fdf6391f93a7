"""Which files of a folder are its weights, and which describe how they are quantized.

The rule: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists; where
there is neither, the only safetensors file there is, whatever its name. A folder with both of the
first two holds two models, and transformers and others would not read the same one: refused."""

from __future__ import annotations

from pathlib import Path

from slim.core.errors import SlimError
from slim.core.io import read_json, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# PEFT's files, when they lie in the folder itself
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# other tools' name for a quantization_config outside config.json -> its quant_method there
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint folder; those that are missing are named all the
    same.

    Args:
        folder: The checkpoint folder.

    Raises:
        SlimError: The folder holds two models, an index of files that are gone, or several
            safetensors files without an index.
    """
    single = folder / SINGLE
    index = folder / INDEX
    if index.is_file():
        listed = listed_files(index)
        if single.is_file() and listed != [SINGLE]:
            refuse_two_models(folder, listed)
        return [folder / name for name in listed]
    if single.is_file():
        return [single]
    others = sorted(path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
    if len(others) > 1:
        raise SlimError(
            f"{folder} has {len(others)} safetensors files ({others[0].name}, ...) and no {INDEX} "
            f"that says which are the model's. Keep one, or write the index."
        )
    return others or [single]


def listed_files(index: Path) -> list[str]:
    """Return the names of the files that an index lists, sorted.

    Raises:
        SlimError: It has no ``weight_map`` of names to files in its own folder.
    """
    content = read_json(index)
    names = []
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        names = sorted(set(map(str, content["weight_map"].values())))
    # a path to elsewhere could have slim read and hash any file of the machine
    if not names or any(Path(name).name != name for name in names):
        raise SlimError(
            f"{index} has no weight_map of tensors to files next to it. Fetch or make it again."
        )
    return names


def refuse_two_models(folder: Path, listed: list[str]) -> None:
    """Raise ``SlimError`` for a folder with a whole file and an index of others.

    Args:
        folder: The checkpoint folder.
        listed: The files that its index lists.
    """
    for name in listed:
        if not (folder / name).is_file():
            raise SlimError(
                f"{folder}: the index {INDEX} is stale: it lists {name}, which is not there, "
                f"next to {SINGLE}.\nDelete the index if {SINGLE} is the model."
            )
    raise SlimError(
        f"{folder} holds two models: {SINGLE}, and the shards that {INDEX} lists.\n"
        "Delete the one that is not meant: other programs would read either."
    )


def refuse_missing(folder: Path, missing: list[str]) -> None:
    """Raise ``SlimError`` for weight files that are not there, saying what is there instead.

    Args:
        folder: The checkpoint folder.
        missing: Names of the files that it should have.
    """
    if (folder / INDEX).is_file():
        raise SlimError(
            f"{folder} lacks the weights {', '.join(missing[:3])}, which its index {INDEX} lists. "
            "Fetch them, or make the checkpoint again."
        )
    pickles = []
    for pattern in PICKLES:
        for path in folder.glob(pattern):
            if not path.name.startswith("adapter_model"):
                pickles.append(path.name)
    if pickles:
        raise SlimError(
            f"{folder} holds pickled weights only ({min(pickles)}), "
            "which can run code when loaded; slim reads safetensors.\n"
            "Convert them with transformers: model.save_pretrained(folder) writes safetensors."
        )
    raise SlimError(f"{folder} lacks the weights {', '.join(missing)}.")


def refuse_lone_adapter(folder: Path) -> None:
    """Raise ``SlimError`` where a folder is an adapter of PEFT and nothing else."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return
    base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
    raise SlimError(
        f"{folder} is a PEFT adapter, not a model.\n"
        f"To merge it into its base: model.source={base} model.adapter={folder}"
    )


def refuse_gguf_files(folder: Path) -> None:
    """Raise ``SlimError`` where a folder without a config holds GGUF files: one of them is
    meant."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        raise SlimError(
            f"{folder} is no checkpoint folder but holds GGUF files ({', '.join(files)}). "
            f"Give one: model.source={folder / files[0]}"
        )


def quantization_file(folder: Path) -> Path | None:
    """Return the file next to the weights that describes their quantization, or None."""
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            return folder / name
    return None
