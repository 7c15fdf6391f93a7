"""Where a chain begins: a checkpoint of the hub, a folder, the embedded model, or a fresh model with random weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slim.architecture import ModelDescription
from slim.checkpoint import (
    MANIFEST,
    Checkpoint,
    checksums,
    hide_library_bars,
    open_checkpoint,
    read_json,
    write_config,
)  # fmt: skip
from slim.errors import SlimError
from slim.settings import require_flag, require_number
from slim.stage import Context, Stage

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {"tiny": ASSETS / "tiny"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]


@dataclass
class Source:
    """An existing checkpoint.

    source: a checkpoint folder, ``tiny`` (the embedded model), or a model id of the hub such as ``org/name``.
    revision: branch, tag or commit of a hub model.
    """

    source: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise SlimError("model.source is missing. Give a checkpoint folder or a hub id: model=hf model.source=...")

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.source if HUB_ID.fullmatch(self.source) else Path(self.source).resolve().name

    def local_folder(self) -> Path | None:
        """Return the folder if the source is one, None if it is a hub id. ``SlimError`` if it can be neither."""
        if self.source in EMBEDDED:
            return EMBEDDED[self.source]
        folder = Path(self.source).expanduser()
        if folder.is_dir():
            return folder
        if not HUB_ID.fullmatch(self.source):
            raise SlimError(f"There is no folder {self.source}. Give model.source=FOLDER or a hub id (org/name).")
        return None

    def describe(self) -> ModelDescription:
        """Describe the model by its ``config.json`` alone; fetches only that file of a hub model."""
        folder = self.local_folder()
        if folder is not None:
            return ModelDescription(open_checkpoint(folder).config, name=self.label)
        from huggingface_hub import hf_hub_download

        path = self._from_hub(lambda: hf_hub_download(self.source, "config.json", revision=self.revision))
        return ModelDescription(read_json(Path(path)), name=self.label)

    def resolve(self) -> Checkpoint:
        """Return the checkpoint, fetched from the hub where needed."""
        folder = self.local_folder()
        if folder is None:
            from huggingface_hub import snapshot_download

            fetch = lambda: snapshot_download(self.source, revision=self.revision, allow_patterns=WANTED_FILES)  # noqa: E731
            folder = Path(self._from_hub(fetch))
        return open_checkpoint(folder)

    def _from_hub(self, fetch):
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            return fetch()
        except GatedRepoError as error:
            raise SlimError(f"{self.source} is gated: accept its licence on the hub, then run 'hf auth login'.") from error
        except RepositoryNotFoundError as error:
            raise SlimError(f"The hub has no model {self.source} (or it is private: run 'hf auth login').") from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise SlimError(
                f"{self.source} is neither a folder here nor in the local hub cache, and the hub cannot be reached. "
                "Check the network (and HF_HUB_OFFLINE), or give model.source=FOLDER."
            ) from error


def verified_checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checkpoint's checksums after comparing them with every record of them there is.

    Records are ``slim.json`` and, for files in the hub's cache, the name of the blob. Raises ``SlimError`` on a
    difference.
    """
    found = checksums(checkpoint.folder)
    recorded = read_json(checkpoint.folder / MANIFEST)["checksums"] if (checkpoint.folder / MANIFEST).is_file() else {}
    for name in found:
        blob = (checkpoint.folder / name).resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            recorded = {**recorded, name: blob.name}
    changed = sorted(name for name, checksum in recorded.items() if found.get(name) != checksum)
    if changed:
        raise SlimError(
            f"{checkpoint.folder}: {', '.join(changed)} differs from its recorded checksum (altered or damaged). "
            f"Fetch or make the checkpoint again{_own_risk(checkpoint)}."
        )
    return found


def _own_risk(checkpoint: Checkpoint) -> str:
    made_here = (checkpoint.folder / MANIFEST).is_file()
    return f", or delete its {MANIFEST} if you changed it on purpose" if made_here else ""


@dataclass
class Untrained(Stage):
    """A fresh Llama-architecture model with random weights and a tokenizer trained on the tiny world's text.

    vocab_size: tokens of the byte-level BPE tokenizer. hidden_size, intermediate_size, blocks, heads, kv_heads: shape.
    context_length: longest input in tokens. tied: whether the head shares the embedding's weights.
    matrix_std, embedding_std: standard deviations of the random weights; norms begin at 1.
    seed: of the weights; the world has its own, ``world_seed``.
    """

    kind: ClassVar[str] = "initialise"
    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    blocks: int = 8
    heads: int = 4
    kv_heads: int = 2
    context_length: int = 512
    tied: bool = False
    matrix_std: float = 0.06
    embedding_std: float = 1.0
    world_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("model.vocab_size", self.vocab_size, 300, 2**20, integer=True)
        for name in ("hidden_size", "intermediate_size", "blocks", "heads", "kv_heads", "context_length"):
            require_number(f"model.{name}", getattr(self, name), 1, integer=True)
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise SlimError("model.heads must divide model.hidden_size, and model.kv_heads must divide model.heads.")
        require_flag("model.tied", self.tied)
        for name in ("matrix_std", "embedding_std"):
            require_number(f"model.{name}", getattr(self, name), 0, 100)

    @property
    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden_size // self.heads,
            "max_position_embeddings": self.context_length,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": self.matrix_std,
            "dtype": "bfloat16",
        }

    def describe(self) -> ModelDescription:
        return ModelDescription(self.config, name="the untrained model")

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        return 6 * model.parameters()  # float32 at creation, then the stored copy

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Write the checkpoint; there is no source."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from slim.world import World
        from slim.world.tokenizer import save_tokenizer, train_tokenizer

        tokenizer = train_tokenizer(World(self.world_seed), self.vocab_size)
        save_tokenizer(tokenizer, target)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = {**self.config, **ids, "vocab_size": len(tokenizer)}
        hide_library_bars()
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:
                    std = self.embedding_std if "embed_tokens" in name else self.matrix_std
                    weight.normal_(0, std, generator=generator)
        model.to(torch.bfloat16).save_pretrained(target)
        write_config({**read_json(target / "config.json"), **config}, target)
        return {}
