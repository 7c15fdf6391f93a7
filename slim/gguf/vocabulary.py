"""From a checkpoint's tokenizer to a GGUF file's vocabulary: the way back of ``tokenizer.py``.

Two kinds can be expressed, byte-level BPE and SentencePiece's BPE. Whether the result does what the
tokenizer did is tried: what the file's vocabulary makes of some texts is compared with what the
tokenizer makes of them, and a difference is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.gguf.tokenizer import (
    BYTE,
    CONTROL,
    END_OF_TURN,
    GPT2,
    KEY,
    NORMAL,
    RULES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    build_tokenizer,
)

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec

TEMPLATE = "tokenizer.chat_template"
# Texts on which both tokenizers must agree: words, digits, spaces, code, accents as one character
# and as two, other scripts, characters outside the basic plane.
PROBES = (
    "Hello world! It's 2024, and I'VE paid 1234567.89 for it.",
    "  two spaces,\ttabs\n\n\nand   lines \r\n of text ",
    "def f(x):\n    return x_1 ** 2  # a/b\\c -> {'k': [1, 22, 333]}\n",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \ufb01ne",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f "
    "\u0645\u0631\u062d\u0628\u0627 \uc548\ub155",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00bd \u2167 \u0663\u0664 \u2026",
    "lowUPPERCamelCase snake_case don't we'll 's 'S",
    "",
)


def vocabulary_entries(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """Return the metadata of a checkpoint's tokenizer and chat template.

    Args:
        folder: The checkpoint.
        spec: Its description; the vocabulary gets as many tokens as the embedding has rows, since
            engines take its size from there.

    Returns:
        Key -> value, all of ``tokenizer.ggml.*`` and ``tokenizer.chat_template``.

    Raises:
        SlimError: GGUF cannot express the tokenizer.
    """
    from slim.checkpoints.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise _refusal(folder, "it has no tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refusal(folder, f"it is of the kind {model['type']}")
    byte_level = not model.get("byte_fallback")
    tokens, kinds = _tokens(content, tokenizer, spec.vocab_size)
    entries = {"model": "gpt2" if byte_level else "llama", "tokens": tokens, "token_type": kinds}
    if byte_level:
        name = rule_name(content)
        if name is None:
            raise _refusal(folder, "GGUF has no name for the rule by which it cuts text")
        entries |= {"pre": name, "merges": [" ".join(pair) for pair in _merges(model)]}
    else:
        entries |= {"scores": _scores(model, tokens), "add_space_prefix": adds_space(content)}
    entries |= _special_entries(folder, tokenizer, tokens)
    named = {f"{KEY}{key}": value for key, value in entries.items()}
    _try_out(folder, tokenizer, named, spec)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {**named, **({TEMPLATE: template} if template else {})}


def _refusal(folder: Path, reason: str) -> SlimError:
    return SlimError(
        f"The tokenizer in {folder} cannot be written as GGUF: {reason}.\n"
        "GGUF holds byte-level BPE and SentencePiece BPE. Use quant.format=compressed-tensors."
    )


def _tokens(content: dict, tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Return the tokens by id and their kinds, exactly ``rows`` of each."""
    model = content["model"]
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    for token, index in model["vocab"].items():
        if index < rows:
            is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
            tokens[index], kinds[index] = token, BYTE if is_byte else NORMAL
    for added in content["added_tokens"]:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown < rows and model.get("byte_fallback"):
        kinds[unknown] = UNKNOWN
    return tokens, kinds


def _merges(model: dict) -> list[tuple[str, str]]:
    """Return the merges as pairs, best first: files list them as pairs or as ``"a b"``."""
    merges = []
    for entry in model["merges"]:
        left, right = entry.split(" ") if isinstance(entry, str) else entry
        merges.append((left, right))
    return merges


def rule_name(content: dict) -> str | None:
    """Return the name under which llama.cpp cuts text as a ``tokenizer.json`` does, or None where
    there is none.
    """
    patterns = _patterns(content.get("pre_tokenizer"))
    composed = _composes(content.get("normalizer"))
    if patterns is None or composed is None:
        return None
    whole_words = bool(content["model"].get("ignore_merges"))
    for name, rule in RULES.items():
        if (rule.patterns, rule.composed, rule.whole_words) == (patterns, composed, whole_words):
            return name
    return None


def _patterns(pre_tokenizer: dict | None) -> tuple[str, ...] | None:
    """Return the regular expressions by which text is cut, one after another; None where something
    else is done.
    """
    if pre_tokenizer is None:
        return None
    patterns = []
    for step in _steps(pre_tokenizer, "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            if step.get("use_regex", True):
                patterns.append(GPT2)
        else:
            return None
    return tuple(patterns)


def _composes(normalizer: dict | None) -> bool | None:
    """Return whether text is brought into its composed form; None where something else is done."""
    if normalizer is None:
        return False
    kinds = [step["type"] for step in _steps(normalizer, "normalizers")]
    if kinds in ([], ["NFC"]):
        return bool(kinds)
    return None


def _steps(part: dict, key: str) -> list[dict]:
    """Return the steps of a part of a ``tokenizer.json``, which may be one step or a sequence."""
    return part[key] if part["type"] == "Sequence" else [part]


def _scores(model: dict, tokens: list[str]) -> list[float]:
    """Return a score per token under which SentencePiece's algorithm merges in the order of the
    merges: minus the rank of the first one that gives the token.
    """
    ranks: dict[str, int] = {}
    for left, right in _merges(model):
        ranks.setdefault(left + right, len(ranks))
    last = len(ranks)
    return [-float(ranks.get(token, last)) for token in tokens]


def adds_space(content: dict) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    normalizer = content.get("normalizer")
    if normalizer is not None:
        kinds = [step["type"] for step in _steps(normalizer, "normalizers")]
        if "Prepend" in kinds:
            return True
    before = content.get("pre_tokenizer")
    if before is None:
        return False
    schemes = [
        step.get("prepend_scheme", "always")
        for step in _steps(before, "pretokenizers")
        if step["type"] == "Metaspace"
    ]
    return bool(schemes) and schemes[0] != "never"


def _special_entries(folder: Path, tokenizer, tokens: list[str]) -> dict[str, Any]:
    """Return the ids of special tokens, and which are put around a text."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": _end_of_turn(folder, tokenizer, tokens),
    }
    entries: dict[str, Any] = {
        f"{name}_token_id": number
        for name, number in ids.items()
        if number is not None and number < len(tokens)
    }
    plain = tokenizer("a", add_special_tokens=False).input_ids
    around = tokenizer("a").input_ids
    extra = len(around) - len(plain)
    entries["add_bos_token"] = extra > 0 and around[0] == ids["bos"]
    entries["add_eos_token"] = extra > 0 and around[-1] == ids["eos"]
    return entries


def _end_of_turn(folder: Path, tokenizer, tokens: list[str]) -> int | None:
    """Return the id of the token that ends a turn, where generation stops at it besides the end of
    the text.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    for number in stops if isinstance(stops, list) else []:
        known = number < len(tokens) and number != tokenizer.eos_token_id
        if known and tokens[number] in END_OF_TURN:
            return number
    return None


def _try_out(folder: Path, tokenizer, entries: dict[str, Any], spec: ModelSpec) -> None:
    """Raise ``SlimError`` where the vocabulary makes other tokens of a text than the tokenizer."""
    from slim.gguf.metadata import architecture_of

    vocabulary = Vocabulary(folder, entries)
    rebuilt = build_tokenizer(vocabulary, architecture_of(spec)[0])
    original = tokenizer.backend_tokenizer
    for text in PROBES:
        for special in (True, False):
            expected = original.encode(text, add_special_tokens=special).ids
            if rebuilt.encode(text, add_special_tokens=special).ids != expected:
                raise _refusal(folder, f"the text {text!r} would become other tokens")
