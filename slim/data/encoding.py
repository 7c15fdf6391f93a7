"""Text and conversations into tokens with labels, by the tokenizer's own conventions and chat
template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from slim.core.errors import SlimError
from slim.data.chat import Message, render_chat, require_chat_template, turns
from slim.data.packing import IGNORE, Example

TEXTS_AT_ONCE = 256  # texts per call of the tokenizer, which works on several in parallel

Span = tuple[int, int]  # first character and the one after the last


def end_token(tokenizer) -> int:
    """Return the id of the token that ends a document.

    Raises:
        SlimError: when the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise SlimError(
            "The model's tokenizer has no end token. Set eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def encode_long(tokenizer, text: str) -> list[int]:
    """Return the tokens of a text longer than the model's context, without the tokenizer's warning
    about that."""
    return tokenizer(text, verbose=False)["input_ids"]


def encode_documents(tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield the tokens of each document; reads ``documents`` (which may be endless) only as far as
    asked."""
    documents = iter(documents)
    while texts := list(islice(documents, TEXTS_AT_ONCE)):
        yield from tokenizer(texts, verbose=False)["input_ids"]


def encode_pairs(tokenizer, pairs: Iterable[tuple[str, str]]) -> Iterator[Example]:
    """Yield each prompt and answer as :func:`encode_conversations` does."""
    return encode_conversations(tokenizer, (turns(prompt, answer) for prompt, answer in pairs))


def encode_conversations(
    tokenizer, conversations: Iterable[list[Message]], title: str = ""
) -> Iterator[Example]:
    """Yield each conversation in the tokenizer's chat template.

    Answers and the tokens that end them have labels; nothing else has.

    Args:
        tokenizer: a fast one of transformers, with a chat template.
        conversations: messages, of which the last is an answer; may be endless.
        title: what to call them in messages, where they do not know where they come from.

    Raises:
        SlimError: when there is no chat template, or one that does not keep what was said as it is
            when an answer is appended.
    """
    require_chat_template(
        tokenizer,
        "Tune on plain text (data=text data.text=FILE), or put a chat_template into its "
        "tokenizer_config.json.",
    )
    if not tokenizer.is_fast:
        raise SlimError(
            "Tuning on conversations needs a fast tokenizer (tokenizer.json), which this model "
            "lacks."
        )
    conversations = iter(conversations)
    while batch := list(islice(conversations, TEXTS_AT_ONCE)):
        yield from _encode_batch(tokenizer, batch, title)


def _encode_batch(tokenizer, conversations: list[list[Message]], title: str) -> Iterator[Example]:
    """Yield some conversations, tokenized together."""
    special_tokens = tokenizer.added_tokens_decoder  # ends of text and of turns, not text itself
    marks = [str(token) for token in special_tokens.values()]
    texts, spans = [], []
    for messages in conversations:
        where = getattr(messages, "where", "") or title
        text, answers = render(tokenizer, messages, marks, where)
        texts.append(text)
        spans.append(answers)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for tokens, offsets, answers in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        example = Example(tokens, _labels(tokens, offsets, answers))
        # the template does not say where an answer ends
        if not tokens or tokens[-1] not in special_tokens:
            example = example.followed_by(end_token(tokenizer))
        yield example


def render(
    tokenizer, messages: list[Message], marks: Sequence[str] = (), where: str = ""
) -> tuple[str, list[Span]]:
    """Return a conversation as text, and where in it every answer stands, with the mark that ends
    it.

    An answer begins where the template, given what was said before, asks for it.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: in their order.
        marks: texts that may end an answer.
        where: the conversation stands, for messages.

    Returns:
        The text without white space at its end, and a span of characters per answer.

    Raises:
        SlimError: when the place of an answer cannot be known.
    """
    text = render_chat(tokenizer, messages, where=where)
    spans: list[Span] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place == 0:  # a greeting answers nothing
            continue
        prompt = render_chat(tokenizer, messages[:place], add_generation_prompt=True, where=where)
        if not text.startswith(prompt):
            raise SlimError(
                f"{where and where + ': '}The chat template of the model's tokenizer changes the "
                "prompt when an answer follows, so where the answer begins is unknown: "
                f"'{prompt[-40:]}' is not the beginning of '{text[:80]}...'."
            )
        if place == len(messages) - 1:
            end = len(text.rstrip())
        else:
            end = _answer_end(text, len(prompt), message["content"], marks, where)
        spans.append((len(prompt), end))
    return text.rstrip(), spans


def _answer_end(text: str, start: int, answer: str, marks: Sequence[str], where: str) -> int:
    """Return where the answer at ``start`` ends in ``text``: after the mark that follows it, if one
    does."""
    answer = answer.strip()
    place = text.find(answer, start)
    if place < 0:
        raise SlimError(
            f"{where and where + ': '}The chat template of the model's tokenizer changes an "
            f"earlier answer ('{answer[:40]}'), so where it ends is unknown. "
            "Use data with one answer a conversation."
        )
    end = place + len(answer)
    next_word = end + len(text[end:]) - len(text[end:].lstrip())
    following = [mark for mark in marks if text.startswith(mark, next_word)]
    mark = max(following, key=len, default="")  # the longest, if one begins another
    return next_word + len(mark) if mark else end


def _labels(tokens: list[int], offsets: list[Span], answers: list[Span]) -> list[int]:
    """Return labels: the token itself where it reaches into an answer, else ``IGNORE``.

    Args:
        tokens: of the conversation.
        offsets: each token's characters, ascending.
        answers: the answers' characters, ascending.
    """
    labels = []
    remaining = list(reversed(answers))  # the next answer is the last of the list
    for token, (begin, end) in zip(tokens, offsets, strict=True):
        while remaining and begin >= remaining[-1][1]:
            remaining.pop()
        in_answer = bool(remaining) and end > remaining[-1][0]
        labels.append(token if in_answer else IGNORE)
    return labels
