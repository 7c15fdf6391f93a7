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
    marks = frozenset(tokenizer.added_tokens_decoder)  # end of text, of turn: what is not text
    while some := list(islice(pairs, AT_ONCE)):
        rendered = [render(tokenizer, prompt, answer) for prompt, answer in some]
        texts, starts = zip(*rendered, strict=True)
        encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for tokens, offsets, start in zip(encoded["input_ids"], encoded["offset_mapping"], starts, strict=True):
            example = _with_labels(tokens, offsets, start)
            if not tokens or tokens[-1] not in marks:  # the template does not say where an answer ends
                example = example.followed_by(end_token(tokenizer))
            yield example


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


def _with_labels(tokens: list[int], offsets: list[tuple[int, int]], start: int) -> Example:
    """Label the tokens that reach beyond character ``start``."""
    return Example(tokens, [token if end > start else IGNORE for token, (_, end) in zip(tokens, offsets, strict=True)])
