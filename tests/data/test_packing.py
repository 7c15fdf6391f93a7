"""Packing: nothing is lost, doubled or padded without need, and packed examples do not see each
other."""

from __future__ import annotations

import json
import random
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.encoding import encode_documents, encode_pairs
from slim.data.examples import Pairs, TextData, TinyChat, TinyText, is_validation, passages
from slim.data.packing import IGNORE, Example, best_fit, concatenate, fit_length, separate
from slim.loading.load_model import load_model

END = 0
documents = st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=20)
lengths = st.lists(st.integers(1, 16), max_size=60)


@given(documents, st.integers(1, 12))
def test_concatenation_keeps_every_token_in_order(texts, window):
    packed = concatenate(texts, window, END)
    stream = [token for text in texts for token in [*text, END]]
    flat = packed.tokens.flatten().tolist()
    assert packed.tokens.shape == (len(stream) // window, window)
    assert flat == stream[: len(flat)]
    assert packed.counts["left_over"] == len(stream) - len(flat) < window
    assert packed.utilisation == 1 and packed.positions is None


def test_concatenation_reads_an_endless_source_only_as_far_as_needed():
    read = []

    def endless():
        for number in count(1):
            read.append(number)
            yield [number % 7 + 1] * 5

    packed = concatenate(endless(), 8, END, limit=30)
    # 5 documents of 5 + 1 tokens, and those the loop looked at
    assert len(packed) == 4 and len(read) == 7


def test_concatenation_does_not_double_an_end_that_is_there():
    assert concatenate([[5, END], [6]], 4, END).tokens.tolist() == [[5, END, 6, END]]


@given(lengths)
def test_best_fit_places_each_item_once_and_wastes_little(sizes):
    bins = best_fit(sizes, 16)
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in members) <= 16 for members in bins)
    # Two bins that are half empty would have been joined; and the proven bound of best fit
    # decreasing.
    assert sum(sum(sizes[item] for item in members) <= 8 for members in bins) <= 1
    assert len(bins) <= 11 / 9 * -(-sum(sizes) // 16) + 4 or 2 * sum(sizes) > 16 * (len(bins) - 1)


def slow_best_fit(sizes: list[int], window: int) -> int:
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in free if space >= size]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - size)
        else:
            free.append(window - size)
    return len(free)


@given(lengths)
def test_best_fit_equals_the_direct_algorithm(sizes):
    assert len(best_fit(sizes, 16)) == slow_best_fit(sizes, 16)


def test_best_fit_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="17 does not fit into 16"):
        best_fit([3, 17], 16)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 6)), min_size=1, max_size=30))
def test_separate_packing_keeps_examples_whole_with_their_own_positions(shapes):
    examples = [
        Example([i + 1] * (prompt + answer), [IGNORE] * prompt + [i + 1] * answer)
        for i, (prompt, answer) in enumerate(shapes)
    ]
    packed = separate(examples, 16, pad=END)
    seen = {}
    columns = (packed.tokens.tolist(), packed.labels.tolist(), packed.positions.tolist())
    for row, labels, positions in zip(*columns, strict=True):
        for token, label, position, before in zip(
            row, labels, positions, [None, *row[:-1]], strict=True
        ):
            assert (position == 0) == (token != before)
            if token:
                seen.setdefault(token, []).append(label)
    # each example once, in one piece; its first token never has a label
    assert seen == {i + 1: [IGNORE, *example.labels[1:]] for i, example in enumerate(examples)}
    assert packed.utilisation == pytest.approx(
        sum(len(e.tokens) for e in examples) / packed.tokens.numel()
    )


def test_long_examples_are_cut_or_dropped_and_counted():
    fits, long = Example([1, 2], [IGNORE, 2]), Example([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4])
    hopeless = Example([1, 2, 3, 4], [IGNORE, IGNORE, IGNORE, 4])  # nothing to learn once it is cut
    kept, counts = fit_length([fits, long, hopeless], 3, "cut")
    assert [e.tokens for e in kept] == [[1, 2], [1, 2, 3]] and counts == {"cut": 1, "dropped": 1}
    kept, counts = fit_length([fits, long, hopeless], 3, "drop")
    assert kept == [fits] and counts == {"cut": 0, "dropped": 2}


# With a model


def some_examples(vocabulary: int) -> list[Example]:
    rng = random.Random(0)
    made = []
    for _ in range(9):
        tokens = [rng.randrange(3, vocabulary) for _ in range(rng.randint(4, 40))]
        made.append(Example(tokens, [IGNORE] * 2 + tokens[2:]))
    return made


def direct_nll(model, tokens, labels, **extra) -> torch.Tensor:
    """The definition: minus the log of the probability that the model gives each labelled token."""
    logits = model(input_ids=tokens, **extra).logits.double()
    total = torch.zeros((), dtype=torch.double)
    for row in range(tokens.shape[0]):
        for place in range(1, tokens.shape[1]):
            if labels[row, place] != IGNORE:
                total -= torch.log_softmax(logits[row, place - 1], -1)[tokens[row, place]]
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_losses_equal_unpacked_ones(small_llama, attention):
    from slim.training.forward import sequence_nll

    model = load_model(small_llama, "float32")
    model.set_attn_implementation(attention)
    examples = some_examples(model.config.vocab_size)
    packed = separate(examples, 64, END)
    assert len(packed) < len(examples) / 2
    alone = torch.zeros((), dtype=torch.double)
    for example in examples:
        tokens = torch.tensor([example.tokens])
        alone += direct_nll(model, tokens, torch.tensor([example.labels]))
    batch = (packed.tokens.long(), packed.labels.long())
    together = sequence_nll(model, *batch, packed.positions.long())
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    # Without positions that start again the examples see each other, so the test above can fail.
    leaking = sequence_nll(model, *batch, None)
    assert abs(leaking.item() - alone.item()) > 0.01


# Encoding


@pytest.fixture(scope="module")
def tokenizer(small_llama):
    return load_tokenizer(small_llama)


def test_only_answers_and_their_end_have_labels(tokenizer):
    pairs = [
        ("Where does Anna live?", "She lives in a town."),
        ("How much is two plus two?", "Four."),
    ]
    for (prompt, answer), example in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        learnt = [label for label in example.labels if label != IGNORE]
        assert tokenizer.decode(learnt).strip() == answer + tokenizer.eos_token
        ignored = [
            token
            for token, label in zip(example.tokens, example.labels, strict=True)
            if label == IGNORE
        ]
        assert prompt in tokenizer.decode(ignored) and answer not in tokenizer.decode(ignored)
        whole = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        assert example.tokens == tokenizer.apply_chat_template(whole, return_dict=False)


def test_an_end_token_is_added_where_the_template_has_none_and_what_follows_it_is_cut(tokenizer):
    plain = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    original = tokenizer.chat_template
    try:
        for end in ("", "<|end|>"):
            tokenizer.chat_template = plain.replace("m['content'] +", f"m['content'] + '{end}' +")
            (example,) = encode_pairs(tokenizer, [("Why?", "So.")])
            learnt = tokenizer.decode([label for label in example.labels if label != IGNORE])
            assert learnt.strip() == "So." + tokenizer.eos_token
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        with pytest.raises(SlimError, match="changes the prompt"):
            list(encode_pairs(tokenizer, [("Why?", "So.")]))
        tokenizer.chat_template = None
        with pytest.raises(SlimError, match="no chat template"):
            list(encode_pairs(tokenizer, [("Why?", "So.")]))
    finally:
        tokenizer.chat_template = original


def test_documents_are_encoded_as_the_tokenizer_does(tokenizer):
    texts = [f"Anna has {n} apples." for n in range(600)]
    assert list(encode_documents(tokenizer, texts)) == [
        tokenizer(text)["input_ids"] for text in texts
    ]


# Data choices


def test_tiny_text_and_chat_give_windows(tokenizer):
    text = TinyText().windows("train", tokenizer, 128, 2000)
    assert text.tokens.shape == (16, 128) and text.utilisation == 1
    chat = TinyChat().windows("train", tokenizer, 128, 4000)
    assert chat.utilisation > 0.95 and 0 < chat.loss_tokens.sum() < chat.tokens.numel() / 2
    again = TinyChat().windows("train", tokenizer, 128, 4000)
    assert torch.equal(chat.tokens, again.tokens) and torch.equal(chat.labels, again.labels)
    assert not torch.equal(
        text.tokens, TinyText(seed=1).windows("train", tokenizer, 128, 2000).tokens
    )


def test_train_and_validation_share_no_document(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f'{{"text": "document {n % 300}"}}\n' for n in range(600)))
    data = TextData(text=str(path), validation_fraction=0.2)
    train, validation = list(data.documents("train")), list(data.documents("validation"))
    assert len(train) + len(validation) == 600 and not set(train) & set(validation)
    assert 60 < len(validation) < 180
    assert all(is_validation(text, 0.2, 0) for text in validation)
    assert sorted(train) == sorted(data.documents("train")) and train != sorted(train)


def test_a_text_file_is_cut_into_passages(tmp_path):
    lines = [f"Line {n} of the book.\n" for n in range(500)]
    assert "".join(passages(["".join(lines)], 100)) == "".join(lines)
    assert "".join(passages(["a", "b\n"], 100)) == "a\nb\n"
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    data = TextData(text=str(path), passage=200)
    parts = [*data.documents("train"), *data.documents("validation")]
    assert len(parts) > 40 and sorted("".join(parts).splitlines()) == sorted(
        "".join(lines).splitlines()
    )
    assert data.cache_key() != TextData(text=str(path), passage=100).cache_key()
    before = data.cache_key()
    path.write_text("".join(lines) + "more\n")
    assert TextData(text=str(path), passage=200).cache_key() != before


def test_pairs_map_columns_and_refuse_bad_data(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    row = '{{"instruction": "Say {n}.", "input": "{input}", "output": "{output}"}}\n'
    path.write_text(
        "".join(row.format(n=n, input="x" * (n % 2), output=f"It is {n}.") for n in range(200))
    )
    columns = dict(text=str(path), prompt="instruction", answer="output", context="input")
    data = Pairs(**columns)
    pairs = {*data.pairs("train"), *data.pairs("validation")}
    assert (
        ("Say 4.", "It is 4.") in pairs
        and ("Say 5.\n\nx", "It is 5.") in pairs
        and len(pairs) == 200
    )
    assert data.windows("train", tokenizer, 128).utilisation > 0.9
    with pytest.raises(SlimError, match="no column 'prompt' .has: instruction, input, output"):
        list(Pairs(text=str(path)).pairs("train"))
    with pytest.raises(SlimError, match="no train example with an answer that fits into 8 tokens"):
        data.windows("train", tokenizer, 8)
    path.write_text("".join(row.format(n=n, input="", output="") for n in range(20)))
    with pytest.raises(SlimError, match="has no answers: column 'output' is empty in all 20 rows"):
        Pairs(**columns).windows("train", tokenizer, 64)
    path.write_text("")
    with pytest.raises(SlimError, match="no answers"):
        Pairs(**columns).windows("train", tokenizer, 64)
    path.write_text("[1]\n")
    with pytest.raises(SlimError, match="line 1: list where an object"):
        list(Pairs(**columns).pairs("train"))


def test_data_sets_have_splits_of_their_own(tmp_path):
    """A local folder in the hub's layout takes the same way as a data set of the hub."""
    for split, size in (("train", 30), ("validation", 7)):
        rows = (
            json.dumps({"text": f" {split} line {n} \n", "q": f"{split} {n}?", "a": f"{n}."})
            for n in range(size)
        )
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    text = TextData(text=str(tmp_path), validation_split="validation", passage=60)
    joined = "".join(sorted(text.documents("train")))
    assert (
        len(list(text.documents("train"))) == 8
        and "validation" not in joined
        and joined.count("line") == 30
    )
    assert all("train" not in passage for passage in text.documents("validation"))
    pairs = Pairs(text=str(tmp_path), prompt="q", answer="a", validation_split="validation")
    assert sorted(pairs.pairs("validation")) == [(f"validation {n}?", f"{n}.") for n in range(7)]
    assert len(list(pairs.pairs("train"))) == 30


def test_empty_text_is_refused(tmp_path, tokenizer):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    with pytest.raises(SlimError, match="gives no train window of 64 tokens"):
        TextData(text=str(path)).windows("train", tokenizer, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextData(), "needs data.text="),
        (lambda: TextData(text="missing.txt"), "There is no text missing.txt"),
        (lambda: TinyChat(long="split"), "data.long=split: must be one of cut, drop"),
        (lambda: Pairs(text="org/name", validation_fraction=0.9), "from 0.001 to 0.5"),
        (lambda: TinyText(seed=-1), "data.seed=-1"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(SlimError, match=message):
        make()
