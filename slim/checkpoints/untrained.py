"""A fresh model with random weights, where pretraining begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import write_config
from slim.core.console import hide_library_bars
from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.core.settings import require_flag, require_number
from slim.models.spec import ModelSpec


@dataclass
class Untrained(Stage):
    """A fresh Llama-architecture model with random weights and a tokenizer trained on the tiny
    world's text.

    Attributes:
        vocab_size: Tokens of the byte-level BPE tokenizer.
        hidden_size: Width of the residual stream.
        intermediate_size: Channels of the MLP.
        blocks: Decoder blocks.
        heads: Query heads; must divide ``hidden_size``.
        kv_heads: Key and value heads; must divide ``heads``.
        context_length: Longest input in tokens.
        tied: Whether the head shares the embedding's weights.
        matrix_std: Standard deviation of the random matrices; norms begin at 1.
        embedding_std: That of the random embeddings.
        world_seed: Of the world whose text the tokenizer is trained on.
        seed: Of the random weights.
    """

    cache_name: ClassVar[str] = "Untrained"

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
        for name in (
            "hidden_size",
            "intermediate_size",
            "blocks",
            "heads",
            "kv_heads",
            "context_length",
        ):
            require_number(f"model.{name}", getattr(self, name), 1, integer=True)
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise SlimError(
                "model.heads must divide model.hidden_size, "
                "and model.kv_heads must divide model.heads."
            )
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

    def describe(self) -> ModelSpec:
        return ModelSpec(self.config, name="the untrained model")

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return 6 * spec.parameters()  # float32 at creation, then the stored copy

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Write the checkpoint.

        Args:
            source: None: nothing comes before it.
            target: An empty folder.
            context: Not needed.

        Returns:
            No metadata.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from slim.tiny_world import World
        from slim.tiny_world.tokenizer import save_tokenizer, train_tokenizer

        tokenizer = train_tokenizer(World(self.world_seed), self.vocab_size)
        save_tokenizer(tokenizer, target)
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = {**self.config, **ids, "vocab_size": len(tokenizer)}
        hide_library_bars()
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:  # norms stay at one
                    std = self.embedding_std if "embed_tokens" in name else self.matrix_std
                    weight.normal_(0, std, generator=generator)
        model.to(torch.bfloat16).save_pretrained(target)
        write_config({**read_json(target / "config.json"), **config}, target)
        return {}
