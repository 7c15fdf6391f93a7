"""Tokenizers from GGUF: byte-level ones against the tokenizer they were taken from, SentencePiece's
against a slow version.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.gguf.tokenizer import RULES, Vocabulary, build_tokenizer, write_tokenizer
from tests.support.gguf_files import ASSETS, KINDS, tiny_tokenizer

TEXTS = [
    "Anna has a red ball. It's hers!",
    "  two  spaces\n\n and lines\t",
    " leading",
    "trailing ",
    "",
    "naïve 日本 😀 čaj",
    "In 2024, 12,345.67 of them'll go",
    "<|user|>\nhello<|end|>",
    "A B  C   D    E",
]


def vocabulary_of(entries: dict, **others) -> Vocabulary:
    return Vocabulary(
        Path("FILE.gguf"),
        {**{f"tokenizer.ggml.{key}": value for key, value in entries.items()}, **others},
    )


# Byte-level ---------------------------------------------------------------------------------------


def test_a_byte_level_tokenizer_comes_back(tmp_path):
    original = load_tokenizer(ASSETS)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    vocabulary = vocabulary_of(
        tiny_tokenizer(), **{"tokenizer.chat_template": template, "llama.context_length": 77}
    )
    write_tokenizer(vocabulary, tmp_path, "llama")
    found = load_tokenizer(tmp_path)
    assert found.get_vocab() == original.get_vocab()
    for text in TEXTS:
        assert found(text).input_ids == original(text).input_ids, text
        assert found.decode(found(text).input_ids) == text
    assert (found.bos_token, found.eos_token, found.pad_token) == (
        original.bos_token,
        original.eos_token,
        original.pad_token,
    )
    assert found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert found.model_max_length == 77
    assert found.decode(found("<|end|>a").input_ids, skip_special_tokens=True) == "a"


CUTS = {  # how each rule cuts this text, by hand from the rules' descriptions
    "gpt-2": ["We", "'ll", " see", " 12345", " TIMES", "!!", "\n\n  ", " ok"],
    "smollm": ["We", "'ll", " see", " ", "1", "2", "3", "4", "5", " TIMES", "!!", "\n\n  ", " ok"],
    "llama-bpe": ["We", "'ll", " see", " ", "123", "45", " TIMES", "!!\n\n", "  ", " ok"],
    "qwen2": ["We", "'ll", " see", " ", "1", "2", "3", "4", "5", " TIMES", "!!\n\n", "  ", " ok"],
    "tekken": ["We", "'ll", " see", " ", "1", "2", "3", "4", "5", " TIMES", "!!\n\n", "  ", " ok"],
    "gpt-4o": ["We'll", " see", " ", "123", "45", " TIMES", "!!\n\n", "  ", " ok"],
}


@pytest.mark.parametrize("rule", CUTS)
def test_rules_cut_text(rule):
    tokenizer = build_tokenizer(vocabulary_of(tiny_tokenizer(rule)), "llama")
    text = "We'll see 12345 TIMES!!\n\n   ok"
    pieces = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == CUTS[rule]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_loses_nothing(rule):
    tokenizer = build_tokenizer(vocabulary_of(tiny_tokenizer(rule)), "llama")
    for text in TEXTS:
        assert (
            tokenizer.decode(
                tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
            )
            == text
        )


def test_rules_differ_in_what_else_they_say():
    composed = build_tokenizer(vocabulary_of(tiny_tokenizer("qwen2")), "qwen2")
    assert composed.encode("e\u0301").ids == composed.encode("\u00e9").ids
    plain = build_tokenizer(vocabulary_of(tiny_tokenizer("gpt-2")), "llama")
    assert plain.encode("e\u0301").ids != plain.encode("\u00e9").ids
    begins = {
        key: value for key, value in tiny_tokenizer("llama-bpe").items() if key != "add_bos_token"
    }
    assert build_tokenizer(vocabulary_of(begins), "llama").encode("a").ids[0] == 0
    assert (
        build_tokenizer(vocabulary_of({**begins, "add_bos_token": False}), "llama")
        .encode("a")
        .ids[0]
        != 0
    )
    both = (
        build_tokenizer(
            vocabulary_of({**begins, "add_eos_token": True, "eos_token_id": 2}), "llama"
        )
        .encode("a")
        .ids
    )
    assert (both[0], both[-1]) == (0, 2)


def test_whole_words_are_taken_as_they_are():
    entries = tiny_tokenizer("llama-bpe")
    entries |= {
        "tokens": [*entries["tokens"], "zqxj"],
        "token_type": [*entries["token_type"], KINDS["normal"]],
    }
    assert build_tokenizer(vocabulary_of(entries), "llama").encode(
        "zqxj", add_special_tokens=False
    ).ids == [1536]
    assert (
        len(build_tokenizer(vocabulary_of({**entries, "pre": "qwen2"}), "llama").encode("zqxj").ids)
        > 1
    )


def test_padding_of_the_embedding_is_no_token():
    entries = tiny_tokenizer()
    entries |= {
        "tokens": [*entries["tokens"], "[PAD1536]"],
        "token_type": [*entries["token_type"], KINDS["unused"]],
    }
    assert build_tokenizer(vocabulary_of(entries), "llama").get_vocab_size() == 1536


def test_user_defined_tokens_are_found_first_and_not_special():
    entries = tiny_tokenizer()
    entries |= {
        "tokens": [*entries["tokens"], "<think>"],
        "token_type": [*entries["token_type"], KINDS["user"]],
    }
    tokenizer = build_tokenizer(vocabulary_of(entries), "llama")
    ids = tokenizer.encode("a<think>b").ids
    assert 1536 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


# SentencePiece ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces() -> dict:
    """A small SentencePiece vocabulary: special tokens, bytes, merged pieces with falling scores,
    single characters.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from slim.tiny_world import World

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=[])
    documents = World(0).documents("train", 0)
    trained.train_from_iterator((next(documents) for _ in range(300)), trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    merged, letters = (
        [token for token in learned if len(token) > 1],
        [token for token in learned if len(token) == 1],
    )
    special = [
        ("<unk>", "unknown"),
        ("<s>", "control"),
        ("</s>", "control"),
        ("<mark>", "user"),
        ("  ", "user"),
    ]
    rows = [(token, KINDS[kind], 0.0 if kind != "user" else -1000.0) for token, kind in special]
    rows += [(f"<0x{byte:02X}>", KINDS["byte"], 0.0) for byte in range(256)]
    rows += [(token, KINDS["normal"], -float(rank)) for rank, token in enumerate(merged + letters)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    columns = dict(
        zip(
            ("tokens", "token_type", "scores"),
            (list(column) for column in zip(*rows, strict=True)),
            strict=True,
        )
    )
    return {"model": "llama", "pre": "default", **columns, **ids}


def slowly(entries: dict, text: str) -> list[int]:
    """SentencePiece's algorithm in its plainest form: again and again the best pair of neighbours,
    the leftmost of equals.

    User-defined tokens are found first, the longest from the left; pieces that are no tokens become
    bytes.
    """
    tokens, kinds, scores = entries["tokens"], entries["token_type"], entries["scores"]
    normal = {token: index for index, token in enumerate(tokens) if kinds[index] == KINDS["normal"]}
    whole = sorted(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind in (2, 3, 4)),
        key=len,
        reverse=True,
    )
    ids, rest = [], text
    while rest:
        places = [(rest.find(token), -len(token), token) for token in whole if token in rest]
        place, _, token = min(places, default=(len(rest), 0, ""))
        ids += _merged(normal, scores, tokens, rest[:place], entries.get("add_space_prefix", True))
        ids += [tokens.index(token)] if token else []
        rest = rest[place + len(token) :]
    return ids


def _merged(normal, scores, tokens, text, prefix):
    if not text:
        return []
    parts = list((" " * prefix + text).replace(" ", "\u2581"))
    while True:
        pairs = [
            (-scores[normal[a + b]], at)
            for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in normal
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += (
            [normal[part]]
            if part in normal
            else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
        )
    return ids


@pytest.mark.parametrize("prefix", [True, False], ids=["space before", "no space before"])
def test_sentence_piece_as_in_the_slow_version(pieces, prefix):
    from slim.tiny_world import World

    entries = {**pieces, "add_space_prefix": prefix}
    tokenizer = build_tokenizer(vocabulary_of(entries), "gemma3")
    documents, letters = World(1).documents("heldout", 0), random.Random(0)
    texts = [next(documents)[:300] for _ in range(20)]
    texts += ["".join(letters.choice("aeinrst .<mark>") for _ in range(40)) for _ in range(50)]
    for text in [*texts, *TEXTS, "a<mark>b", "x   y    z", "über 日本"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == slowly(entries, text), text
        if prefix is False:
            assert tokenizer.decode(slowly(entries, text), skip_special_tokens=False) == text
    words = tokenizer.encode("Anna has a red ball.").tokens
    assert len(words) < 12  # and not one for each letter


def test_sentence_piece_decodes_without_the_space_it_put_before(pieces, tmp_path):
    write_tokenizer(vocabulary_of(pieces), tmp_path, "llama")
    tokenizer = load_tokenizer(tmp_path)
    for text in ("Anna has a red ball.", " leading", "naïve 日本"):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1  # SentencePiece's begin, where the file does not say otherwise
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokens_of_equal_score_count_by_their_ids(pieces):
    """Files made without SentencePiece's own model give every token the same score."""
    flat = {**pieces, "scores": [-1000.0] * len(pieces["scores"])}
    expected, found = (
        build_tokenizer(vocabulary_of(entries), "llama") for entries in (pieces, flat)
    )
    assert found.encode(TEXTS[0]).ids == expected.encode(TEXTS[0]).ids


def test_marks_of_phi3_take_white_space_along(pieces):
    entries = {
        **pieces,
        "tokens": ["<|stop|>" if token == "</s>" else token for token in pieces["tokens"]],
    }
    for architecture, ids in (
        ("phi3", [2, 2]),
        ("llama", [2, *slowly({**pieces, "add_space_prefix": True}, "\n"), 2]),
    ):
        tokenizer = build_tokenizer(vocabulary_of(entries), architecture)
        assert tokenizer.encode("<|stop|>\n<|stop|>", add_special_tokens=False).ids == ids


# Where generation stops ---------------------------------------------------------------------------


def test_stops(pieces):
    assert vocabulary_of(pieces).stops() == [2]
    assert vocabulary_of({**pieces, "eot_token_id": 3}).stops() == [2, 3]
    renamed = {
        **pieces,
        "tokens": ["<|im_end|>" if token == "<s>" else token for token in pieces["tokens"]],
    }
    assert vocabulary_of(renamed).stops() == [2]
    assert vocabulary_of(renamed, **{"tokenizer.chat_template": "{{ x }}<|im_end|>"}).stops() == [
        1,
        2,
    ]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"has no tokenizer"),
        ({"tokens": None}, r"has no tokenizer \(tokenizer.ggml.tokens\)"),
        (
            {"model": "bert"},
            r"a tokenizer of the kind 'bert', which slim does not read. It reads gpt2 and llama",
        ),
        ({"pre": None}, r"no name for the rule .*\(tokenizer.ggml.pre\)"),
        ({"pre": "smolm"}, r"(?s)unknown name 'smolm' for the rule.* Did you mean smollm\?"),
        ({"merges": None}, r"lists no merges"),
        ({"bos_token_id": 5000}, r"5000 is named as a special token, and there are 1536 tokens"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(SlimError, match=message):
        vocabulary_of({**tiny_tokenizer(), **changes}).check(1536)


def test_other_mistakes(pieces):
    with pytest.raises(SlimError, match="lists no score for every token"):
        vocabulary_of({**pieces, "scores": [0.0]}).check(5000)
    with pytest.raises(SlimError, match="1536 tokens and only 1000 rows of embeddings"):
        vocabulary_of(tiny_tokenizer()).check(1000)
    with pytest.raises(SlimError, match="the merge 'a bcd' is not of two tokens"):
        build_tokenizer(vocabulary_of({**tiny_tokenizer(), "merges": ["a bcd"]}), "llama")
