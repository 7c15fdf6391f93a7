"""A fresh encoder with random weights and a head for the classes of the data, where training from
nothing begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import write_config
from slim.core.console import hide_library_bars
from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.core.settings import require_number
from slim.data.base import TRAIN
from slim.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARKS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass
class UntrainedEncoder(Stage):
    """A fresh BERT with random weights; its vocabulary is the words of the data's texts, and its
    head tells their classes apart.

    Attributes:
        data: Texts with labels.
        vocab_size: Tokens at most.
        hidden_size: Width.
        intermediate_size: Channels of the MLP.
        blocks: How many.
        heads: Must divide ``hidden_size``.
        context_length: Longest input in tokens.
        dropout: Share of what is left out in training, 0 to 0.9.
        seed: Of the random weights.
    """

    cache_name: ClassVar[str] = "UntrainedEncoder"

    kind: ClassVar[str] = "initialise"
    data: object = field(default=None)
    vocab_size: int = 2000
    hidden_size: int = 64
    intermediate_size: int = 128
    blocks: int = 4
    heads: int = 4
    context_length: int = 128
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not hasattr(self.data, "classes"):
            raise SlimError(
                "This model is made for the classes of its data: use data=headlines, or "
                "data=labelled data.text=FILE.csv (task=classification chooses them)."
            )
        require_number("model.vocab_size", self.vocab_size, 100, 2**20, integer=True)
        for name in ("hidden_size", "intermediate_size", "blocks", "heads"):
            require_number(f"model.{name}", getattr(self, name), 1, integer=True)
        require_number("model.context_length", self.context_length, 8, integer=True)
        require_number("model.dropout", self.dropout, 0, 0.9)
        if self.hidden_size % self.heads:
            raise SlimError("model.heads must divide model.hidden_size.")

    @property
    def config(self) -> dict:
        """The result's ``config.json``, the vocabulary at its largest."""
        labels = self.data.classes
        return {
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context_length,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "initializer_range": self.hidden_size**-0.5,
            "pad_token_id": 0,
            "dtype": "float32",
            "id2label": {str(number): name for number, name in enumerate(labels)},
            "label2id": {name: number for number, name in enumerate(labels)},
        }

    def describe(self) -> ModelSpec:
        return ModelSpec(self.config, name="the untrained encoder")

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return 8 * spec.parameters()

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Write the checkpoint.

        Args:
            source: None: nothing comes before it.
            target: An empty folder.
            context: Not needed.

        Returns:
            ``vocabulary``: how many tokens there are.
        """
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        tokenizer = train_wordpiece(
            (example.text for example in self.data.examples(TRAIN)),
            self.vocab_size,
            self.context_length,
        )
        tokenizer.save_pretrained(target)
        config = {**self.config, "vocab_size": len(tokenizer)}
        hide_library_bars()
        torch.manual_seed(self.seed)
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(**config), dtype=torch.float32
        )
        model.save_pretrained(target)
        write_config({**read_json(target / "config.json"), **config}, target)
        return {"vocabulary": len(tokenizer)}


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, context_length: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer as BERT's (lower case, ``[CLS]`` text ``[SEP]``) that knows the words of
    some texts.

    Args:
        texts: What to learn from.
        vocab_size: Tokens at most, see :func:`wordpieces`.
        context_length: Longest input in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            counts[word] += 1
    vocabulary = wordpieces(counts, vocab_size)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=MARKS["unk_token"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(MARKS.values()))
    begin, end = MARKS["cls_token"], MARKS["sep_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (begin, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context_length, **MARKS
    )


def wordpieces(counts: Counter[str], vocab_size: int) -> dict[str, int]:
    """Return token -> number: marks, all characters, as first of a word and inside one, and the
    most frequent words. Other words are spelled.

    The library's own trainer gives another vocabulary each time, and the same command must give
    the same weights.

    Args:
        counts: Word -> how often it occurs.
        vocab_size: Tokens at most, more where there are more characters.
    """
    characters = sorted({character for word in counts for character in word})
    tokens = [*MARKS.values(), *characters]
    tokens += [f"##{character}" for character in characters]
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(tokens) >= vocab_size:
            break
        if len(word) > 1:
            tokens.append(word)
    return {token: number for number, token in enumerate(tokens)}
