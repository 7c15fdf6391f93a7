"""Text and conversations into tokens with labels, by the tokenizer's own conventions and chat
template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from slim.core.errors import SlimError
from slim.data.packing import IGNORE, Example

AT_ONCE = 256  # texts per call of the tokenizer, which works on several in parallel

Message = dict[str, str]  # role ("system", "user", "assistant") and content
Span = tuple[int, int]  # first character and the one behind the last


def turns(question: str, answer: str) -> list[Message]:
    """Return the messages of a question with its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def end_token(tokenizer) -> int:
    """Return the id of the token that ends a document. Raises ``SlimError`` if the tokenizer has
    none."""
    if tokenizer.eos_token_id is None:
        raise SlimError(
            "The model's tokenizer has no end token. Set eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def encode_documents(tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield the tokens of each document; reads ``documents`` (which may be endless) only as far as
    asked."""
    documents = iter(documents)
    while some := list(islice(documents, AT_ONCE)):
        yield from tokenizer(some, verbose=False)["input_ids"]


def encode_pairs(tokenizer, pairs: Iterable[tuple[str, str]]) -> Iterator[Example]:
    """Yield each prompt and answer as :func:`encode_conversations` does."""
    return encode_conversations(tokenizer, (turns(prompt, answer) for prompt, answer in pairs))


def encode_conversations(tokenizer, conversations: Iterable[list[Message]]) -> Iterator[Example]:
    """Yield each conversation in the tokenizer's chat template; answers and the tokens that end
    them have labels.

    conversations: messages, of which the last is an answer. Raises ``SlimError`` if there is no
    chat template, or one that does not keep what was said as it is when an answer is appended."""
    if not getattr(tokenizer, "chat_template", None):
        raise SlimError(
            "The model's tokenizer has no chat template, so it cannot be tuned on conversations. "
            "Tune on plain text (data=text data.text=FILE), or put a chat_template into its tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise SlimError(
            "Tuning on conversations needs a fast tokenizer (tokenizer.json), which this model lacks."
        )
    conversations = iter(conversations)
    added = tokenizer.added_tokens_decoder  # end of text, of turn: what is not text
    marks = [str(token) for token in added.values()]
    while some := list(islice(conversations, AT_ONCE)):
        texts, spans = zip(*(render(tokenizer, messages, marks) for messages in some), strict=True)
        encoded = tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for tokens, offsets, answers in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            example = Example(tokens, _labels(tokens, offsets, answers))
            # the template does not say where an answer ends
            if not tokens or tokens[-1] not in added:
                example = example.followed_by(end_token(tokenizer))
            yield example


def render(tokenizer, messages: list[Message], marks: Sequence[str] = ()) -> tuple[str, list[Span]]:
    """Return the conversation as text, and where in it every answer stands, with the mark that ends
    it.

    An answer begins where the template, given what was said before, asks for it. marks: texts that
    may end an answer."""
    text = _templated(tokenizer, messages)
    spans: list[Span] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:place], add_generation_prompt=True)
        if not text.startswith(before):
            raise SlimError(
                "The chat template of the model's tokenizer changes the prompt when an answer follows, so where the answer "
                f"begins is unknown: '{before[-40:]}' is not the beginning of '{text[:80]}...'."
            )
        last = place == len(messages) - 1
        end = (
            len(text.rstrip())
            if last
            else _answer_end(text, len(before), message["content"], marks)
        )
        spans.append((len(before), end))
    return text.rstrip(), spans


def _templated(tokenizer, messages: list[Message], **settings) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise SlimError(
            f"The chat template of the model's tokenizer refuses a conversation of {roles}: {error} "
            "Give data whose turns it knows, without system messages for example."
        ) from error


def _answer_end(text: str, start: int, answer: str, marks: Sequence[str]) -> int:
    """Return where the answer at ``start`` ends in ``text``: behind the mark that follows it, if
    one does."""
    place = text.find(answer.strip(), start)
    if place < 0:
        raise SlimError(
            f"The chat template of the model's tokenizer changes an earlier answer ('{answer.strip()[:40]}'), so where it "
            "ends is unknown. Use data with one answer a conversation."
        )
    end = place + len(answer.strip())
    behind = end + len(text[end:]) - len(text[end:].lstrip())
    found = max((mark for mark in marks if text.startswith(mark, behind)), key=len, default="")
    return behind + len(found) if found else end


def _labels(tokens: list[int], offsets: list[Span], answers: list[Span]) -> list[int]:
    """Label the tokens that reach into an answer. offsets: each token's characters, ascending."""
    labels, remaining = [], list(reversed(answers))
    for token, (begin, end) in zip(tokens, offsets, strict=True):
        while remaining and begin >= remaining[-1][1]:
            remaining.pop()
        labels.append(token if remaining and end > remaining[-1][0] else IGNORE)
    return labels
