"""Text and conversations into tokens with labels, by the tokenizer's own conventions and chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from slim.data.packing import IGNORE, Example
from slim.errors import SlimError

AT_ONCE = 256  # texts per call of the tokenizer, which works on several in parallel


def end_token(tokenizer) -> int:
    """Return the id of the token that ends a document. Raises ``SlimError`` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise SlimError("The model's tokenizer has no end token. Set eos_token in its tokenizer_config.json.")
    return tokenizer.eos_token_id


def encode_documents(tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield the tokens of each document; reads ``documents`` (which may be endless) only as far as asked."""
    documents = iter(documents)
    while some := list(islice(documents, AT_ONCE)):
        yield from tokenizer(some, verbose=False)["input_ids"]


def encode_pairs(tokenizer, pairs: Iterable[tuple[str, str]]) -> Iterator[Example]:
    """Yield each prompt and answer in the tokenizer's chat template; only the answer and its end token have labels.

    Raises ``SlimError`` if there is no chat template, or one that does not keep the prompt as it is when the answer
    is appended.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SlimError(
            "The model's tokenizer has no chat template, so it cannot be tuned on conversations. "
            "Tune on plain text (data=text data.text=FILE), or put a chat_template into its tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise SlimError("Tuning on conversations needs a fast tokenizer (tokenizer.json), which this model lacks.")
    pairs = iter(pairs)
    while some := list(islice(pairs, AT_ONCE)):
        rendered = [render(tokenizer, prompt, answer) for prompt, answer in some]
        encoded = tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for (text, start), tokens, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield _with_labels(tokenizer, tokens, offsets, start)


def render(tokenizer, prompt: str, answer: str) -> tuple[str, int]:
    """Return the conversation as text and the character at which the answer begins."""
    question = [{"role": "user", "content": prompt}]
    whole = [*question, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    before = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if not text.startswith(before):
        raise SlimError(
            "The chat template of the model's tokenizer changes the prompt when an answer follows, so where the answer "
            f"begins is unknown: '{before[-40:]}' is not the beginning of '{text[:80]}...'."
        )
    return text.rstrip(), len(before)


def _with_labels(tokenizer, tokens: list[int], offsets: list[tuple[int, int]], start: int) -> Example:
    """Label the tokens that reach beyond character ``start``; append the end token where the template has none."""
    labels = [token if end > start else IGNORE for token, (_, end) in zip(tokens, offsets, strict=True)]
    if not tokens or not is_end(tokenizer, tokens[-1]):
        tokens, labels = [*tokens, end_token(tokenizer)], [*labels, end_token(tokenizer)]
    return Example(tokens, labels)


def is_end(tokenizer, token: int) -> bool:
    """Whether a token is a mark (end of text, of turn) and not text."""
    return token in tokenizer.added_tokens_decoder
