"""Answers to many questions at once."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig

from slim.training.forward import plain_model


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[list[int]], new_tokens: int, ends: set[int], temperature: float
) -> list[list[int]]:
    """Answer many questions at once; the model keeps its mode, but answers without dropout.

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        prompts: The tokens of each question.
        new_tokens: Longest answer.
        ends: Tokens that end an answer.
        temperature: Tokens are drawn from softmax(logits / temperature), by torch's global
            generator; 0: the most likely one.

    Returns:
        The tokens of an answer to each prompt, up to and including the first of ``ends``.
    """
    plain = plain_model(model)
    device = plain.get_input_embeddings().weight.device
    pad = min(ends)
    tokens, mask = left_padded(prompts, pad)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
        **drawing(temperature),
    )
    training = model.training
    model.eval()
    rows = plain.generate(
        input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    model.train(training)
    return [up_to_end(row, ends) for row in rows[:, tokens.shape[1] :].tolist()]


def left_padded(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of different lengths as tokens and mask, int64 [prompts, longest] each.

    Args:
        prompts: Their tokens.
        pad: What stands before shorter ones, so that all end where the answers begin.
    """
    length = max(len(prompt) for prompt in prompts)
    tokens: list[list[int]] = []
    mask: list[list[int]] = []
    for prompt in prompts:
        free = length - len(prompt)
        tokens.append([pad] * free + prompt)
        mask.append([0] * free + [1] * len(prompt))
    return torch.tensor(tokens), torch.tensor(mask)


def drawing(temperature: float) -> dict:
    """Return how transformers chooses the next token, without the limits it has by default.

    Args:
        temperature: See :func:`generate`.
    """
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the tokens up to and including the first of ``ends``, or all of them.

    Args:
        tokens: Of an answer.
        ends: Tokens that end it.
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
