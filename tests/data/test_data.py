"""Data sets: the hub's layouts and schemas, dialogues of many turns, parts that are kept apart,
streams, what people see."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from slim.checkpoints.source import EMBEDDED
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data import corpus
from slim.data.base import length_counts, share_of
from slim.data.encoding import encode_conversations
from slim.data.examples import PARTS, Messages, Pairs, Passages, TextData, TinyChat, TinyText
from slim.data.packing import IGNORE, Example, Windows, separate
from slim.data.preview import first_examples, show_example, write_examples

CONF = Path(__file__).parent.parent.parent / "slim" / "conf" / "data"

# Templates in the manner of common models; the third leaves out of earlier answers what it puts
# before the last one.
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|end|>' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    """The tiny model's; a new one for every test, since tests change its template."""
    return load_tokenizer(EMBEDDED["tiny"])


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


DIALOGUE = [
    turn("user", "Who is Anna?"),
    turn("assistant", "A nurse."),
    turn("user", "Where?"),
    turn("assistant", "Here."),
]


def learnt_runs(tokenizer, example: Example) -> list[str]:
    """The runs of tokens with labels, decoded one token list at a time."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.tokens, example.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


# Dialogues


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["A nurse.<|end|>", "Here.<|end|>"]),
        (CHATML, ["A nurse.<|end|>", "Here.<|end|>"]),
        (INSTRUCT, ["A nurse. <|end|>", "Here. <|end|>"]),
        (THINKING, ["A nurse.<|end|>", "<think></think>Here.<|end|>"]),
        # no mark between turns: only what follows the last answer is known
        (BARE, ["A nurse.", "Here.<|end|>"]),
    ],
)
def test_every_answer_and_the_mark_behind_it_is_learnt_and_nothing_else(
    tokenizer, template, expected
):
    tokenizer.chat_template = template or tokenizer.chat_template
    (example,) = encode_conversations(tokenizer, [DIALOGUE])
    assert [run.strip() for run in learnt_runs(tokenizer, example)] == expected
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False).rstrip()
    assert tokenizer.decode(example.tokens).removesuffix("<|end|>") == text.removesuffix("<|end|>")


def test_answers_that_repeat_the_question_are_found_where_they_stand(tokenizer):
    echo = [
        turn("user", "Yes"),
        turn("assistant", "Yes"),
        turn("user", "Yes"),
        turn("assistant", "Yes"),
    ]
    (example,) = encode_conversations(tokenizer, [echo])
    assert learnt_runs(tokenizer, example) == [" Yes<|end|>", " Yes<|end|>"]


def test_templates_that_cannot_be_taken_apart_are_refused(tokenizer):
    tokenizer.chat_template = INSTRUCT
    with pytest.raises(
        SlimError, match="refuses a conversation of system, user, assistant: no system role"
    ):
        list(encode_conversations(tokenizer, [[turn("system", "Be kind."), *DIALOGUE[:2]]]))
    tokenizer.chat_template = BARE.replace("m['content']", "m['content'] | upper")
    with pytest.raises(SlimError, match="changes an earlier answer .'A nurse.'"):
        list(encode_conversations(tokenizer, [DIALOGUE]))


def test_a_conversation_that_a_template_refuses_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = INSTRUCT
    rows = [{"messages": DIALOGUE}, {"messages": [turn("system", "Be kind."), *DIALOGUE]}]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Messages(str(file), validation_fraction=0.001)
    with pytest.raises(SlimError, match=r"some.jsonl, line 2: The chat template .* refuses"):
        data.windows("train", tokenizer, 64)


def messages_of(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return Messages(str(file), validation_fraction=0.001)


def test_a_greeting_is_read_and_not_learnt(tokenizer, tmp_path):
    greeting = [turn("assistant", "Hello."), turn("user", "Who?"), turn("assistant", "Anna.")]
    (conversation,) = messages_of(tmp_path, greeting).conversations("train")
    (example,) = encode_conversations(tokenizer, [conversation])
    assert "Hello." in tokenizer.decode(example.tokens)
    assert learnt_runs(tokenizer, example) == [" Anna.<|end|>"]


def test_an_answer_to_nothing_counts_as_unanswered(tokenizer, tmp_path):
    data = messages_of(tmp_path, DIALOGUE, [turn("user", ""), turn("assistant", "Anna.")])
    assert data.windows("train", tokenizer, 64).counts["unanswered"] == 1


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_of_tools_are_refused(tokenizer, tmp_path, key):
    call = {**turn("assistant", None), key: [{"name": "f"}]}
    data = messages_of(tmp_path, DIALOGUE, [turn("user", "Who?"), call, *DIALOGUE])
    with pytest.raises(SlimError, match=f"rows.jsonl, line 2: .* a turn with '{key}'"):
        data.windows("train", tokenizer, 64)


def test_a_tokenizer_without_padding_will_do_and_one_without_an_end_will_not(tokenizer):
    tokenizer.pad_token = None
    assert len(TinyChat().windows("train", tokenizer, 64, 500)) > 3
    tokenizer.eos_token = None
    with pytest.raises(SlimError, match="no end token. Set eos_token in its tokenizer_config.json"):
        TinyChat().windows("train", tokenizer, 64, 500)


# Data sets of the hub, as files in their layout and schema


def hub_folder(folder: Path, rows: dict[str, list[dict]], subset: str | None = None) -> Path:
    """Write a data set as the hub keeps it: Parquet files, and the splits and configurations in
    README.md."""
    place = folder / (subset or "data")
    place.mkdir(parents=True)
    for split, found in rows.items():
        pq.write_table(pa.Table.from_pylist(found), place / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{place.name}/{split}-*"} for split in rows]
    card = yaml.safe_dump({"configs": [{"config_name": subset or "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


def choice(name: str, **settings):
    """Make the data of ``conf/data`` with other settings, such as a local folder for ``text``."""
    composed = settings_of(name) | {"seed": 0} | settings
    kinds = {"Pairs": Pairs, "Messages": Messages, "Passages": Passages, "TextData": TextData}
    return kinds[composed.pop("_target_").rsplit(".", 1)[1]](**composed)


def settings_of(name: str) -> dict:
    """Return a choice file's settings over those of the file it builds on."""
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    base, *own = settings.pop("defaults", ["_self_"])
    assert own in ([], ["_self_"])
    return settings if base == "_self_" else settings_of(base) | settings


def marco(number: int, selected: int | None, answer: str) -> dict:
    texts = [f"Passage {number}.{n}." for n in range(3)]
    passages = {
        "is_selected": [int(n == selected) for n in range(3)],
        "passage_text": texts,
        "url": ["u"] * 3,
    }
    return {
        "answers": [answer], "passages": passages, "query": f"question {number}", "query_id": number,
        "query_type": "DESCRIPTION", "wellFormedAnswers": [],
    }  # fmt: skip


def test_ms_marco(tmp_path, tokenizer):
    rows = [
        marco(0, 1, "It is so."),
        marco(1, 0, "No Answer Present."),
        marco(2, None, "Unfounded."),
        marco(3, 2, "Yes."),
    ]
    folder = hub_folder(tmp_path / "set", {"train": rows, "validation": rows[3:]}, "v2.1")
    data = choice("ms_marco", text=str(folder))
    assert sorted(pair for pair in data.pairs("train") if pair[1]) == [
        ("question 0\n\nPassage 0.1.", "It is so."), ("question 3\n\nPassage 3.2.", "Yes."),
    ]  # fmt: skip
    counts = data.windows("train", tokenizer, 64).counts
    assert counts["examples"] == 2 and counts["unanswered"] == 2
    assert [answer for _, answer in data.pairs("validation")] == ["Yes."]
    assert len(list(choice("ms_marco", text=str(folder), answer=None).questions("train"))) == 4


def test_ultrachat(tmp_path, tokenizer):
    rows = [
        {"prompt": f"{n}?", "prompt_id": str(n), "messages": [turn("user", f"{n}?"), *DIALOGUE[1:]]}
        for n in range(5)
    ]
    rows.append({"prompt": "x", "prompt_id": "x", "messages": [turn("user", "Unanswered?")]})
    folder = hub_folder(
        tmp_path / "set", {"train_sft": rows, "test_sft": rows[:2], "train_gen": rows}
    )
    data = choice("ultrachat_200k", text=str(folder))
    found = data.windows("train", tokenizer, 64)
    assert found.counts["examples"] == 5 and found.counts["unanswered"] == 1
    assert int(found.loss_tokens.sum()) == 5 * len(
        tokenizer(" A nurse.<|end|> Here.<|end|>")["input_ids"]
    )
    assert len(list(data.conversations("validation"))) == 2
    assert sorted(data.questions("validation")) == ["0?", "1?"]


def test_dolly(tmp_path):
    rows = [
        {"instruction": "Who?", "context": "", "response": "Anna.", "category": "open_qa"},
        {
            "instruction": "Where?",
            "context": "Anna lives here.\n",
            "response": "Here.",
            "category": "closed_qa",
        },
    ]
    (tmp_path / "databricks-dolly-15k.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = choice("dolly", text=str(tmp_path), validation_fraction=0.001)
    assert sorted(data.pairs("train")) == [
        ("Where?\n\nAnna lives here.", "Here."),
        ("Who?", "Anna."),
    ]


@pytest.mark.parametrize("name", ["c4", "bookcorpus"])
def test_streamed_text(tmp_path, tokenizer, name, monkeypatch):
    import datasets

    kept = [{"text": f"Sentence number {n}."} for n in range(2000)]
    folder = hub_folder(
        tmp_path / "set", {"train": kept, "validation": kept[:9]}, "en" if name == "c4" else None
    )
    read = []
    honest = datasets.load_dataset

    def watched(*args, **settings):
        assert settings["streaming"] is True
        return (read.append(row) or row for row in honest(*args, **settings))

    monkeypatch.setattr(datasets, "load_dataset", watched)
    monkeypatch.setattr(corpus, "BUFFER", 16)
    data = choice(name, text=str(folder), revision=None, passage=100 if name == "bookcorpus" else 0)
    assert data.endless
    windows = data.windows("train", tokenizer, 32, 320)
    # a batch of the tokenizer more than needed, not all
    assert len(windows) == 10 and len(read) < 1000 + 256 * 5
    assert len(data.windows("validation", tokenizer, 32, 64)) >= 2


def test_every_choice_of_the_group_is_one_that_can_be_made():
    for path in CONF.glob("[!_]*.yaml"):
        settings = settings_of(path.stem)
        assert path.read_text().startswith("# ") and "# python train.py " in path.read_text(), path
        if settings.get("text", "???") != "???" and "tiny" not in path.stem:
            assert choice(path.stem).cache_key()["dataset"] == settings["text"]


# Other schemas


def test_dialogues_in_other_schemas(tmp_path, tokenizer):
    path = tmp_path / "shared.jsonl"
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi?"},
        {"from": "gpt", "value": "Hello."},
    ]
    columns = {"from": ["human", "gpt", "human"], "value": ["Hi?", "Hello.", "Bye?"]}
    rows = [
        {"conversations": turns},
        {"conversations": json.dumps(turns)},
        {"conversations": columns},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = Messages(
        text=str(path),
        messages="conversations",
        role="from",
        content="value",
        validation_fraction=0.001,
    )
    found = list(data.conversations("train"))
    answered = [turn("user", "Hi?"), turn("assistant", "Hello.")]
    assert sorted(found, key=len) == [
        answered,
        [turn("system", "Be kind."), *answered],
        [turn("system", "Be kind."), *answered],
    ]
    for content, message in (
        ([{"role": "user", "content": "Hi?"}], "without 'from' and 'value'.*has: role, content"),
        ([{"from": "judge", "value": "Hm."}], "a turn of 'judge'. Roles slim knows: system, user"),
        ("Hi?", "holds text that is no list of turns"),
    ):
        path.write_text(json.dumps({"conversations": content}))
        with pytest.raises(SlimError, match=message):
            list(data.conversations("train"))
    with pytest.raises(
        SlimError, match="no column 'messages' .has: conversations.. Set data.messages"
    ):
        Messages(text=str(path)).windows("train", tokenizer, 64)


def test_rows_of_parquet_files_and_null_cells(tmp_path):
    path = tmp_path / "some.parquet"
    pq.write_table(
        pa.table({"q": ["One?", "Two?"], "a": [["1", "i"], []], "text": ["x", None]}), path
    )
    data = Pairs(text=str(path), prompt="q", answer="a", validation_fraction=0.001)
    assert sorted(data.pairs("train")) == [("One?", "1"), ("Two?", "")]
    assert list(TextData(text=str(path)).source("train").documents()) == ["x", ""]
    path.write_bytes(b"no table")
    with pytest.raises(SlimError, match="not a Parquet file"):
        list(data.pairs("train"))


def test_all_dialogues_unanswered_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"messages": [turn("user", "Why?")]}))
    with pytest.raises(SlimError, match="no train example with an answer.*unanswered: 1"):
        Messages(text=str(path), validation_fraction=0.001).windows("train", tokenizer, 64)


# Parts


@pytest.mark.parametrize("streaming", [False, True])
def test_three_parts_share_nothing_and_leave_nothing_out(tmp_path, streaming):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Document {n % 400}."}) for n in range(800)))
    data = TextData(
        text=str(path), validation_fraction=0.2, test_fraction=0.1, seed=3, streaming=streaming
    )
    parts = {part: list(data.documents(part)) for part in PARTS}
    assert sum(map(len, parts.values())) == 800 and len(set().union(*parts.values())) == 400
    sets = [set(found) for found in parts.values()]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all(share_of(text, 3) < 0.2 for text in sets[1]) and all(
        share_of(text, 3) >= 0.9 for text in sets[2]
    )
    assert [len(part) for part in sets] == [
        pytest.approx(400 * share, abs=30) for share in (0.7, 0.2, 0.1)
    ]
    assert (
        data.cache_key()
        != TextData(
            text=str(path), validation_fraction=0.2, seed=3, streaming=streaming
        ).cache_key()
    )


def test_the_tiny_worlds_parts_share_no_document():
    parts = [
        set(doc for doc, _ in zip(TinyText().documents(part), range(300), strict=False))
        for part in PARTS
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    with pytest.raises(SlimError, match="no test part"):
        TinyChat().pairs("test")


def test_a_split_to_measure_with_is_not_trained_on(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}')
    folder, file = str(tmp_path), str(tmp_path / "train.jsonl")
    for settings, message in (
        (dict(text=folder, split="test"), "data.split=test is there to test models"),
        (dict(text=folder, split="test_sft[:10%]"), "is there to test models"),
        (
            dict(text=folder, split="train", validation_split="train"),
            "must differ, and two of them are train",
        ),
        (dict(text=folder, validation_split="test", test_split="test"), "two of them are test"),
        (dict(text=file, validation_split="validation"), "is one file and has no splits"),
        (dict(text=folder, test_fraction=0.9), "data.test_fraction=0.9"),
        (dict(text=folder, streaming="yes"), "data.streaming=yes"),
    ):
        with pytest.raises(SlimError, match=message):
            TextData(**settings)


def test_a_folder_is_known_by_its_content(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}')
    name = lambda: TextData(text=str(tmp_path)).cache_key()  # noqa: E731
    before = name()
    (tmp_path / ".cache").write_text("left by a tool")
    assert name() == before
    (tmp_path / "train.jsonl").write_text('{"text": "y"}')
    assert name() != before


def test_a_stream_is_shuffled_nearby_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BUFFER", 10)
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{n}\n" for n in range(300)))
    data = TextData(text=str(path), passage=1, streaming=True, validation_fraction=0.001)
    found = [int(text) for text in data.documents("train")]
    assert (
        sorted(found) == list(range(300))
        and found != sorted(found)
        and found == [int(t) for t in data.documents("train")]
    )
    # never read further ahead than the buffer
    assert all(number <= place + 10 for place, number in enumerate(found))
    whole = TextData(text=str(path), passage=1, validation_fraction=0.001)
    assert sorted(whole.documents("train")) == sorted(data.documents("train"))


def test_a_stream_has_no_epochs(tmp_path):
    from slim.training.tune import Lora

    path = tmp_path / "some.txt"
    path.write_text("x\n")
    with pytest.raises(SlimError, match="never ends, so it has no epochs"):
        Lora(data=TextData(text=str(path), streaming=True), epochs=1)


# Lengths, and what people see


def test_lengths_are_counted_before_anything_is_cut(tmp_path, tokenizer):
    assert length_counts(range(1, 101)) == {"median_length": 50, "p95_length": 95, "longest": 100}
    assert (
        length_counts([7]) == {"median_length": 7, "p95_length": 7, "longest": 7}
        and length_counts([]) == {}
    )
    path = tmp_path / "some.jsonl"
    words = [3] * 18 + [10, 200]
    path.write_text(
        "\n".join(json.dumps({"prompt": f"{n}?", "answer": "apple " * n}) for n in words)
    )
    counts = (
        Pairs(text=str(path), long="cut", validation_fraction=0.001)
        .windows("train", tokenizer, 64)
        .counts
    )
    sizes = sorted(len(e) for e in encode_conversations(tokenizer, [
        [turn("user", f"{n}?"), turn("assistant", "apple " * n)] for n in words
    ]))  # fmt: skip
    assert (
        counts["longest"] == sizes[-1] > 200
        and counts["median_length"] == sizes[9]
        and counts["p95_length"] == sizes[18]
    )
    assert counts["cut"] == 1 and counts["dropped"] == 0 and counts["examples"] == 20


def test_reading_goes_on_until_enough_fits(tmp_path, tokenizer):
    """Conversations that are dropped do not count towards the tokens that are wanted."""
    path = tmp_path / "some.jsonl"
    rows = [{"prompt": f"{n}?", "answer": "apple " * (100 if n % 10 else 5)} for n in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    windows = Pairs(text=str(path), validation_fraction=0.001).windows("train", tokenizer, 32, 200)
    assert (
        windows.counts["dropped"] > 50
        and 200 <= windows.tokens.numel() - windows.counts["padding"] < 240
    )


def test_the_first_examples_are_shown_with_what_is_not_learnt_marked(tokenizer, tmp_path, capsys):
    ends = tokenizer.decode([tokenizer.eos_token_id])
    example = next(iter(encode_conversations(tokenizer, [DIALOGUE])))
    windows = separate([example, Example([5, 6, 7], [IGNORE, 6, 7])], 64, tokenizer.pad_token_id)
    expected = f"«<|user|> Who is Anna?<|assistant|>» A nurse.{ends}«<|user|> Where?<|assistant|>» Here.{ends}"
    assert (
        first_examples(windows, tokenizer, 1) == [expected]
        and len(first_examples(windows, tokenizer, 5)) == 2
    )
    write_examples(windows, tokenizer, tmp_path)
    assert expected in (tmp_path / "examples.txt").read_text()
    show_example(windows, tokenizer)
    assert "A nurse." in capsys.readouterr().err
    text = torch.tensor([tokenizer("Anna is here.")["input_ids"]], dtype=torch.int32)
    assert first_examples(Windows(text, text), tokenizer) == ["Anna is here."]
    show_example([[1, 2]], tokenizer)  # questions whose answers are made later
    assert capsys.readouterr().err == ""
