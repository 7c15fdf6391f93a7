"""Greedy generation in two phases, the prompt at once and then token by token, so that each can be
timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slim.core.console import track
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def prefill(model, ids: torch.Tensor, cache=None):
    """Run a prompt.

    Args:
        model: a torch module of transformers.
        ids: int64 [batch, tokens].
        cache: an empty key/value cache to fill; None for one that grows.

    Returns:
        The most likely next token, int64 [batch, 1], and the cache.
    """
    # of the prompt's logits only the last ones are needed, which spares a large matrix
    settings = {"use_cache": True, "logits_to_keep": 1}
    # some models take None for the cache of another forward pass
    if cache is not None:
        settings["past_key_values"] = cache
    output = model(input_ids=ids, **settings)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def decode(model, token: torch.Tensor, cache) -> Iterator[torch.Tensor]:
    """Yield one most likely token after the other, without end.

    Args:
        model: a torch module of transformers.
        token: int64 [batch, 1], the one before.
        cache: the key/value cache of what is before it; grows with each token.

    Yields:
        int64 [batch, 1].
    """
    while True:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        cache = output.past_key_values
        yield token


def continue_text(model, tokenizer, prompt: str, new_tokens: int) -> str:
    """Continue a text greedily.

    Args:
        model: a torch module of transformers.
        tokenizer: of the checkpoint.
        prompt: the text.
        new_tokens: most tokens to generate.

    Returns:
        What follows the prompt, up to the end-of-text token.
    """
    return continue_ids(model, tokenizer, tokenizer(prompt)["input_ids"], new_tokens)


def continue_ids(model, tokenizer, prompt: list[int], new_tokens: int) -> str:
    """Continue tokens greedily.

    Args:
        model: a torch module of transformers.
        tokenizer: of the checkpoint.
        prompt: tokens, one at least.
        new_tokens: most tokens to generate.

    Returns:
        What follows the prompt as text, up to the end-of-text token, without special tokens.
    """
    ends = end_tokens(model, tokenizer)
    ids = torch.tensor([prompt], device=model.device)
    chosen: list[int] = []
    with torch.inference_mode():
        token, cache = prefill(model, ids)
        following = decode(model, token, cache)
        while len(chosen) < new_tokens and token.item() not in ends:
            chosen.append(token.item())
            # the last token needs no forward pass after it
            if len(chosen) < new_tokens:
                token = next(following)
    return tokenizer.decode(chosen, skip_special_tokens=True)


def end_tokens(model, tokenizer) -> set[int]:
    """Return the ids of the tokens that end a text.

    Args:
        model: a torch module of transformers, whose generation settings may name several.
        tokenizer: of the checkpoint; its end-of-text token counts where they name none.
    """
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    # chat models often end a turn with another token than the one that ends a text
    if ends is None:
        ends = tokenizer.eos_token_id
    if isinstance(ends, (list, tuple)):
        return set(ends)
    return {ends} - {None}  # a tokenizer may have none


def samples(model, tokenizer, prompts: list[str], new_tokens: int) -> list[dict[str, str]]:
    """Continue several texts greedily, with a progress bar.

    Args:
        model: a torch module of transformers.
        tokenizer: of the checkpoint.
        prompts: the texts.
        new_tokens: most tokens to generate for each.

    Returns:
        ``prompt`` and ``answer`` of each.
    """
    rows = []
    for prompt in track(prompts, "sample generations"):
        answer = continue_text(model, tokenizer, prompt, new_tokens)
        rows.append({"prompt": prompt, "answer": answer})
    return rows
