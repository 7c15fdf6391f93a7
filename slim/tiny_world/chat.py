"""The chat format: ``<|user|> question<|assistant|> answer<|end|>``. The answer ends with the
end-of-text token."""

from __future__ import annotations

from collections.abc import Iterable

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"

# The generation marks let `apply_chat_template(return_assistant_tokens_mask=True)` find the
# answers' tokens.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|> ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ ' ' + message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(turns: Iterable[tuple[str, str]]) -> str:
    """The turns as text, exactly as ``TEMPLATE`` renders them."""
    return "".join(f"{USER} {question}{ASSISTANT} {answer}{END}" for question, answer in turns)
