"""From a GGUF file's vocabulary to a tokenizer of transformers.

The file lists tokens, their kinds and scores or merges; how text is cut before merging is told by a
name. Two kinds are read:

- ``gpt2``: byte-level BPE. Merges are listed; ``tokenizer.ggml.pre`` names the rule by which text
  is cut (``RULES``).
- ``llama``: SentencePiece's BPE. Merges are not listed but follow from tokens and scores: two
  neighbouring pieces may be merged if what they spell is a token, the best score first. Text is not
  cut at all; spaces are tokens' own (``U+2581``), and what no token spells becomes bytes.

transformers' own conversion is not used: where it does not know a rule's name, it cuts text by
GPT-2's without a word.

Sources: llama.cpp, ``src/llama-vocab.cpp`` (names of rules, kinds of tokens); SentencePiece,
``src/bpe_model.cc`` (order of merges); the ``tokenizer.json`` of the models that the rules are
named after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.errors import SlimError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from slim.gguf.reader import GgufModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # kinds of tokens (gguf.TokenType)
SPACE = "\u2581"  # how SentencePiece spells a space
KEY = "tokenizer.ggml."
# What a turn of a chat may end with, besides the end of the text, in the order in which llama.cpp
# looks for it.
END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
)

# Regular expressions that cut text before merging, as in the models' tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION_AND_SPACES}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{PUNCTUATION_AND_SPACES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
PATHS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{PATHS_AND_SPACES}"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{PATHS_AND_SPACES}"


@dataclass(frozen=True)
class Rule:
    """How text is cut before merging.

    Args:
        patterns: Regular expressions; each cuts the pieces of the one before into its matches and
            what is between them.
        composed: Whether text is brought into Unicode's composed form (NFC) first.
        whole_words: Whether a piece that is a token is taken as it is, also where merging would not
            lead to it.
        begins: Whether texts begin with the begin token, where the file does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    whole_words: bool = False
    begins: bool = False


_GPT2, _DIGITS = Rule((GPT2,)), Rule((r"\p{N}", GPT2))
_LLAMA3, _QWEN2, _GPT4O = (
    Rule((LLAMA3,), whole_words=True, begins=True),
    Rule((QWEN2,)),
    Rule((GPT4O,)),
)
RULES: Mapping[str, Rule] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Rule((LLAMA3,)),
    "dbrx": Rule((LLAMA3,)),
    "qwen2": Rule((QWEN2,), composed=True),
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT4O,
    "llama4": Rule((GPT4O,), whole_words=True, begins=True),
    "tekken": Rule((TEKKEN,), whole_words=True, begins=True),
    # What llama.cpp does with this name, which stands in files made before their models' own rule
    # had one.
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer.

    Args:
        path: The file, for messages.
        metadata: Its metadata.
    """

    path: Path
    metadata: Mapping

    @classmethod
    def of(cls, model: GgufModel) -> Vocabulary:
        """Return the vocabulary of a file.

        Raises:
            SlimError: It has none, or one that cannot be read.
        """
        vocabulary = cls(model.path, model.metadata)
        vocabulary.check(model.tensors["token_embd.weight"].shape[0])
        return vocabulary

    def entry(self, key: str, default=None):
        """Return the entry ``tokenizer.ggml.KEY`` of the metadata."""
        return self.metadata.get(KEY + key, default)

    def check(self, rows: int) -> None:
        """Raise ``SlimError`` for a vocabulary that is missing, of an unknown kind, or larger than
        the embedding.

        Args:
            rows: Rows of the embedding. There may be more than tokens.
        """
        kind, tokens = self.entry("model"), self.entry("tokens")
        if kind in (None, "none", "no_vocab") or not tokens:
            raise SlimError(
                f"{self.path} has no tokenizer ({KEY}tokens). Give a file with one, or the model's "
                "folder or hub id."
            )
        if kind not in ("gpt2", "llama"):
            raise SlimError(
                f"{self.path} has a tokenizer of the kind '{kind}', which slim does not read. It "
                "reads gpt2 and llama."
            )
        if kind == "gpt2":
            self.rule  # noqa: B018 - refuses an unknown one
        if kind == "gpt2" and not self.entry("merges"):
            raise SlimError(
                f"{self.path} lists no merges ({KEY}merges), and without them its tokenizer cannot "
                "work."
            )
        if (
            kind == "llama"
            and not self.entry("merges")
            and len(self.entry("scores", [])) != len(tokens)
        ):
            raise SlimError(
                f"{self.path} lists no score for every token ({KEY}scores): its tokenizer cannot "
                "work without."
            )
        if len(tokens) > rows:
            raise SlimError(
                f"{self.path} has {len(tokens)} tokens and only {rows} rows of embeddings. Fetch "
                "or make it again."
            )
        ids = [
            self.entry(f"{name}_token_id")
            for name in ("bos", "eos", "unknown", "padding", "eot", "eom")
        ]
        wrong = [number for number in ids if number is not None and not 0 <= number < len(tokens)]
        if wrong:
            raise SlimError(
                f"{self.path}: {wrong[0]} is named as a special token, and there are {len(tokens)} "
                "tokens."
            )

    @property
    def rule(self) -> Rule:
        """How text is cut before merging. Raises ``SlimError`` where the file does not say, or
        names an unknown rule.
        """
        name = self.entry("pre")
        if name not in RULES:
            what = f"the unknown name '{name}' for" if name else "no name for"
            raise SlimError(
                f"{self.path} has {what} the rule by which its tokenizer cuts text ({KEY}pre), and "
                "by another rule the model "
                "would read other tokens.\nslim knows "
                f"{', '.join(RULES)}.{did_you_mean(str(name), RULES)} "
                "A newer file of the model may name one, or give the model's folder or hub id."
            )
        return RULES[name]

    @property
    def kinds(self) -> list[int]:
        """The kind of each token."""
        return self.entry("token_type") or [NORMAL] * len(self.entry("tokens"))

    @property
    def tokens(self) -> list[str]:
        """The tokens by id, without unused ones at the end: embeddings are often longer than
        vocabularies.
        """
        tokens, kinds = self.entry("tokens"), self.kinds
        count = len(tokens)
        while count and kinds[count - 1] == UNUSED:
            count -= 1
        return tokens[:count]

    def special(self, name: str) -> str | None:
        """Return the special token ``bos``, ``eos``, ``unknown`` or ``padding``, or None."""
        number = self.entry(f"{name}_token_id")
        if number is None and name == "unknown":
            number = next((index for index, kind in enumerate(self.kinds) if kind == UNKNOWN), None)
        return None if number is None else self.entry("tokens")[number]

    @property
    def begins(self) -> bool:
        """Whether texts begin with the begin token."""
        usual = self.rule.begins if self.entry("model") == "gpt2" else True
        return bool(self.entry("add_bos_token", usual)) and self.special("bos") is not None

    @property
    def ends(self) -> bool:
        """Whether texts end with the end token."""
        return bool(self.entry("add_eos_token", False)) and self.special("eos") is not None

    def stops(self) -> list[int]:
        """Return the ids at which generation stops: the end of the text, and of a turn where the
        file names one.

        A file that does not name the end of a turn often uses one in its chat template all the
        same.
        """
        ids = [self.entry(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        template, tokens, kinds = (
            self.metadata.get("tokenizer.chat_template", ""),
            self.entry("tokens"),
            self.kinds,
        )
        if self.entry("eot_token_id") is None:
            positions = {
                token: index
                for index, token in enumerate(tokens)
                if kinds[index] in (CONTROL, USER_DEFINED)
            }
            ids += [
                positions[token]
                for token in END_OF_TURN
                if token in positions and token in template
            ][:1]
        return sorted({number for number in ids if number is not None})


def write_tokenizer(vocabulary: Vocabulary, folder: Path, architecture: str) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

    Args:
        vocabulary: What the file says.
        folder: The checkpoint's folder.
        architecture: ``general.architecture``, for what only the model tells.
    """
    from transformers import PreTrainedTokenizerFast

    from slim.tiny_world.tokenizer import save_tokenizer

    tokenizer = build_tokenizer(vocabulary, architecture)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: vocabulary.special(key) for name, key in names.items()}
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=vocabulary.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=vocabulary.metadata.get(f"{architecture}.context_length"),
        **{name: token for name, token in special.items() if token is not None},
    )
    save_tokenizer(loaded, folder)


def build_tokenizer(vocabulary: Vocabulary, architecture: str) -> Tokenizer:
    """Return the tokenizer that a file describes."""
    build = byte_level if vocabulary.entry("model") == "gpt2" else sentence_piece
    tokenizer = build(vocabulary)
    tokens = added_tokens(vocabulary, architecture)
    tokenizer.add_special_tokens([token for token in tokens if token.special])
    tokenizer.add_tokens([token for token in tokens if not token.special])
    tokenizer.post_processor = begin_and_end(vocabulary)
    return tokenizer


def byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Return a byte-level BPE tokenizer without its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = vocabulary.rule
    tokenizer = Tokenizer(
        models.BPE(positions(vocabulary), listed_merges(vocabulary), ignore_merges=rule.whole_words)
    )
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(vocabulary.entry("add_space_prefix", False)), use_regex=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    """Return a BPE tokenizer that does what SentencePiece does, without its special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab, prefix = positions(vocabulary), vocabulary.entry("add_space_prefix", True)
    merges = listed_merges(vocabulary) if vocabulary.entry("merges") else scored_merges(vocabulary)
    unknown, bytes_too = vocabulary.special("unknown"), BYTE in vocabulary.kinds
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_too)
    )
    spell = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spell]) if prefix else spell
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def positions(vocabulary: Vocabulary) -> dict[str, int]:
    """Return token -> id."""
    return {token: index for index, token in enumerate(vocabulary.tokens)}


def listed_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges as the file lists them, best first: two tokens with a space between them.

    Raises:
        SlimError: A merge is no pair of tokens.
    """
    vocab, merges = positions(vocabulary), []
    for line in vocabulary.entry("merges"):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise SlimError(
                f"{vocabulary.path}: the merge {line!r} is not of two tokens to a third. Fetch or "
                "make the file again."
            )
        merges.append((left, right))
    return merges


def scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges that tokens and scores imply, best first.

    A token may come from every pair of tokens that spell it. Tokens of equal score count by their
    ids: files made without SentencePiece's own model give all the same score, and ids follow the
    order in which merges were learned.

    Only normal tokens take part: text never spells control tokens and bytes, and user-defined ones
    are found before merging.
    """
    scores, kinds, tokens = vocabulary.entry("scores"), vocabulary.kinds, vocabulary.tokens
    vocab = {token: index for index, token in enumerate(tokens) if kinds[index] == NORMAL}
    merges = []
    for token in sorted(vocab, key=lambda token: (-scores[vocab[token]], vocab[token])):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((left, right))
    return merges


def added_tokens(vocabulary: Vocabulary, architecture: str) -> list[AddedToken]:
    """Return the tokens that are found in a text before it is cut: control tokens (special) and
    user-defined ones.
    """
    from tokenizers import AddedToken

    kinds, unknown = vocabulary.kinds, vocabulary.special("unknown")
    # Phi-3's marks take the white space behind them along; its file does not say so (llama.cpp goes
    # by the name, too).
    greedy = architecture == "phi3" and vocabulary.entry("model") == "llama"
    plain = ("<unk>", "<s>", "<|endoftext|>")
    result = []
    for token, kind in zip(vocabulary.tokens, kinds, strict=False):
        if kind in (CONTROL, UNKNOWN) or token == unknown:
            result.append(
                AddedToken(
                    token, special=True, normalized=False, rstrip=greedy and token not in plain
                )
            )
        elif kind == USER_DEFINED:
            result.append(AddedToken(token, special=False, normalized=False))
    return result


def begin_and_end(vocabulary: Vocabulary):
    """Return the processor that puts begin and end tokens around a text, where wanted."""
    from tokenizers import processors

    begin = [vocabulary.special("bos")] if vocabulary.begins else []
    end = [vocabulary.special("eos")] if vocabulary.ends else []
    ids = {"bos": vocabulary.entry("bos_token_id"), "eos": vocabulary.entry("eos_token_id")}
    names = {
        vocabulary.special(name): ids[name]
        for name in ids
        if vocabulary.special(name) in begin + end
    }
    single = [*(f"{token}:0" for token in begin), "$A:0", *(f"{token}:0" for token in end)]
    second = [*(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)]
    return processors.TemplateProcessing(
        single=single, pair=single + second, special_tokens=list(names.items())
    )
