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
    """Return the tokens of an answer to each prompt: at most ``new_tokens``, up to and with the
    first of ``ends``.

    temperature: tokens are drawn from softmax(logits / temperature), by torch's global generator;
    0: the most likely one. The model keeps its mode, but answers without dropout."""
    training = model.training
    model.eval()
    device = plain_model(model).get_input_embeddings().weight.device
    length, pad = max(map(len, prompts)), min(ends)
    rows = [[pad] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
        **drawing,
    )
    found = plain_model(model).generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=settings,
    )
    model.train(training)
    return [up_to_end(row, ends) for row in found[:, length:].tolist()]


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the tokens up to and with the first of ``ends``, or all of them."""
    first = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: first + 1]
