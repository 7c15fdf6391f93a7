"""The world's tokenizer: byte-level BPE, trained on the world's own text, with the marks of its
chat format."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from slim.tiny_world.chat import ASSISTANT, END, PAD, TEMPLATE, USER
from slim.tiny_world.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTS = 6000
MAX_LENGTH = 512


def train_tokenizer(world: World, vocab_size: int = 1536, seed: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on 6000 training documents; the same call gives the same one.

    ``<|end|>`` is both the beginning and the end of a text, so the documents of a packed window
    need one mark between them; ``<|pad|>`` pads. No mark is added by itself when encoding.

    Args:
        world: gives the documents.
        vocab_size: entries, marks and bytes included.
        seed: of the documents.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = [END, PAD, USER, ASSISTANT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=marks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(world.documents("train", seed), DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save under the class name that transformers 4 and engines built on it know too.

    Args:
        tokenizer: from :func:`train_tokenizer`.
        folder: to write into.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
