"""An adapter that is not merged: it lies next to the weights it was trained on, in a folder of
PEFT's own layout.

    config.json                            with "slim_adapter": {"parameters": N}
    model*.safetensors                     the weights, quantised or plain, as they were
    adapter/adapter_config.json            PEFT's LoraConfig
    adapter/adapter_model.safetensors      float32

``slim.loading.load_model.load_model`` applies it. Without slim, where another program can load the
weights: ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER), FOLDER +
"/adapter")``."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from slim.checkpoints.checkpoint import ADAPTER_FILES
from slim.checkpoints.writer import write_config
from slim.core.errors import SlimError
from slim.core.io import read_json, save_tensors
from slim.models.spec import ADAPTER
from slim.quantization.kernels.linear import QuantLinear

if TYPE_CHECKING:
    from slim.checkpoints.checkpoint import Checkpoint


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write a model's adapters into a checkpoint, and that they belong to it.

    Args:
        model: The model, wrapped by PEFT.
        folder: The checkpoint folder with the weights that they were trained on.
    """
    from peft import get_peft_model_state_dict

    config_file, weights_file = (folder / name for name in ADAPTER_FILES)
    config_file.parent.mkdir()
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_tensors(state, weights_file)
    settings = {
        # sets have another order in every process
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()
    }
    settings |= {"base_model_name_or_path": None, "inference_mode": True}
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    count = sum(tensor.numel() for tensor in state.values())
    write_config({**read_json(folder / "config.json"), ADAPTER: {"parameters": count}}, folder)


def attach_adapter(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's adapter into its model, frozen, in evaluation mode; the model keeps its
    class.

    Args:
        model: The loaded model.
        checkpoint: The checkpoint, with an adapter next to the weights.

    Raises:
        SlimError: The adapter does not belong to this model, or the package peft is missing.
    """
    from safetensors.torch import load_file

    peft = import_peft(str(checkpoint.folder))
    config_file, weights_file = checkpoint.adapter_files
    config = peft.LoraConfig.from_pretrained(str(config_file.parent))
    state = load_file(weights_file)
    teach_packed_layers(config)
    try:
        with quiet_peft():
            peft.inject_adapter_in_model(config, model)
            loaded = peft.set_peft_model_state_dict(model, state)
    except (ValueError, RuntimeError) as error:
        raise SlimError(
            f"The adapter in {checkpoint.folder} does not fit its model: "
            f"{str(error).splitlines()[0]}"
        ) from error
    missing = [name for name in loaded.missing_keys if "lora_" in name]
    if missing or loaded.unexpected_keys:
        problem = (
            f"{missing[0]} is missing" if missing else f"{loaded.unexpected_keys[0]} is unknown"
        )
        raise SlimError(
            f"The adapter in {checkpoint.folder} does not belong to its model: {problem}."
        )
    model.requires_grad_(False).eval()


def import_peft(owner: str) -> ModuleType:
    """Return the package peft.

    Args:
        owner: What needs it, for the message.

    Raises:
        SlimError: It is not installed.
    """
    try:
        with quiet_peft():
            return importlib.import_module("peft")
    except ImportError as error:
        raise SlimError(
            f"{owner} has an adapter, which needs the package peft: pip install peft."
        ) from error


def teach_packed_layers(config) -> None:
    """Tell PEFT that slim's packed layers take the adapters of dense ones: these only add to what a
    layer gives."""
    from peft.tuners.lora.layer import Linear

    config._register_custom_module({QuantLinear: Linear})


class quiet_peft(warnings.catch_warnings):
    """Within it PEFT and bitsandbytes say nothing of layers they do not know and kernels that are
    not needed here."""

    def __enter__(self):
        entered = super().__enter__()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        return entered
