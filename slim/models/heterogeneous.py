"""Models whose blocks differ in size: what plain transformers needs to build them from
``per_layer_config``.

transformers' configurations hold sizes per layer (``config.per_layer_config[i]``), but the decoder
layers of Llama, Mistral, Qwen and Gemma do not read them: building one raises an error. Here those
layers learn to read them. ``import slim`` is enough; it costs nothing, since each modelling file is
amended when transformers itself first imports it, and a model whose blocks are alike is built
exactly as before.

The layer's own ``__init__`` is wrapped in place of registering another class: the class stays the
same, so everything that knows layers by their class (recorded hidden states, sharding,
checkpointing) works on these models too."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

CARD = "README.md"
# modelling file -> the classes in it that are built once per block
LAYERS = {
    f"transformers.models.{family}.modeling_{family}": f"{name}DecoderLayer"
    for family, name in (
        ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"),
        ("gemma2", "Gemma2"), ("gemma3", "Gemma3"),
    )
}  # fmt: skip


def register() -> None:
    """Amend the modelling files that are loaded already, and the others as soon as they are."""
    if not any(isinstance(finder, AmendingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AmendingFinder())
    for name in LAYERS:
        if name in sys.modules:
            read_sizes_per_layer(sys.modules[name])


class AmendingFinder(importlib.abc.MetaPathFinder):
    """Finds the modelling files as Python would, with a loader that amends them once they have
    run."""

    def find_spec(
        self, fullname: str, path=None, target=None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in LAYERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = AmendingLoader(spec.loader)
        return spec


class AmendingLoader(importlib.abc.Loader):
    """Runs a module by its own loader, then amends it."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    # source lines, file names: whatever else a loader is asked for
    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        read_sizes_per_layer(module)


def read_sizes_per_layer(module: ModuleType) -> None:
    """Make the decoder layer of a modelling file build itself by the configuration of its own
    place."""
    layer = getattr(module, LAYERS[module.__name__], None)
    if layer is None or getattr(layer.__init__, "reads_sizes_per_layer", False):
        return
    build = layer.__init__

    @functools.wraps(build)
    def build_by_place(self, config, layer_idx: int):
        if not getattr(config, "is_heterogeneous", False):
            return build(self, config, layer_idx)
        build(self, config.per_layer_config[layer_idx], layer_idx)
        # sizes are built; settings such as the attention's kind stay those of the model
        for part in self.modules():
            if hasattr(part, "config"):
                part.config = config

    build_by_place.reads_sizes_per_layer = True
    layer.__init__ = build_by_place


def write_card(folder: Path) -> None:
    """Write the model card of a checkpoint whose blocks differ: how to load it."""
    (folder / CARD).write_text(
        "---\nlibrary_name: transformers\n---\n"
        "# A model whose blocks differ in size\n\n"
        "The sizes of every block are in `config.json` under `per_layer_config`. "
        "The model classes of transformers do\n"
        "not read them yet; with slim imported they do:\n\n"
        "```python\n"
        "import slim\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")\n'
        "```\n",
        encoding="utf-8",
    )
