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
    """Run the prompt ``ids``, int64 [batch, tokens]; return the most likely next token [batch, 1]
    and the cache.

    cache: an empty key/value cache to fill; None for one that grows.
    """
    given = {} if cache is None else {"past_key_values": cache}
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def decode(model, token: torch.Tensor, cache) -> Iterator[torch.Tensor]:
    """Yield one most likely token [batch, 1] after the other, without end; ``cache`` grows with
    each."""
    while True:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        yield token


def continue_text(model, tokenizer, prompt: str, new_tokens: int) -> str:
    """Return the greedy continuation of ``prompt``: at most ``new_tokens`` tokens, up to the
    end-of-text token."""
    return continue_ids(model, tokenizer, tokenizer(prompt)["input_ids"], new_tokens)


def continue_ids(model, tokenizer, prompt: list[int], new_tokens: int) -> str:
    """Return the greedy continuation of the tokens ``prompt`` as text, as :func:`continue_text`
    does."""
    ends = end_tokens(model, tokenizer)
    ids = torch.tensor([prompt], device=model.device)
    chosen: list[int] = []
    with torch.inference_mode():
        token, cache = prefill(model, ids)
        following = decode(model, token, cache)
        while len(chosen) < new_tokens and token.item() not in ends:
            chosen.append(token.item())
            if len(chosen) < new_tokens:
                token = next(following)
    return tokenizer.decode(chosen, skip_special_tokens=True)


def end_tokens(model, tokenizer) -> set[int]:
    """Return the ids of the tokens that end a text, as the generation settings or the tokenizer
    say."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}


def samples(model, tokenizer, prompts: list[str], new_tokens: int) -> list[dict[str, str]]:
    """Return ``{"prompt", "answer"}`` for each prompt."""
    return [
        {"prompt": prompt, "answer": continue_text(model, tokenizer, prompt, new_tokens)}
        for prompt in track(prompts, "sample generations")
    ]
