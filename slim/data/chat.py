"""Chat templates: the one place where slim has a tokenizer's template write a conversation."""

from __future__ import annotations

from collections.abc import Iterable

from slim.core.errors import SlimError

Message = dict[str, str]  # role ("system", "user", "assistant") and content


class Conversation(list[Message]):
    """Messages that know where they come from.

    Attributes:
        where: they stand, such as ``FILE, line 3``; empty: unknown.
    """

    def __init__(self, messages: Iterable[Message], where: str = ""):
        super().__init__(messages)
        self.where = where


DEFAULT = "default"  # the template that the library takes where a tokenizer has several


def turns(question: str, answer: str) -> list[Message]:
    """Return the messages of a question with its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def has_chat_template(tokenizer) -> bool:
    """Whether a tokenizer has any chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def require_chat_template(tokenizer, advice: str, who: str = "The model's tokenizer") -> None:
    """Require a chat template that the library takes without being told its name.

    Args:
        tokenizer: of transformers.
        advice: what to do for a tokenizer without any, a sentence.
        who: whose tokenizer it is, for the message.

    Raises:
        SlimError: when there is no template, or there are several and none is the default.
    """
    if not has_chat_template(tokenizer):
        raise SlimError(f"{who} has no chat template. {advice}")
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and DEFAULT not in templates:
        raise SlimError(
            f"{who} has the chat templates {', '.join(templates)} and none named {DEFAULT}. Write "
            "the one to use into a file chat_template.jinja in the model's folder."
        )


def render_chat(
    tokenizer, messages: list[Message], add_generation_prompt: bool = False, where: str = ""
) -> str:
    """Return a conversation as text, written by the tokenizer's chat template.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: in their order.
        add_generation_prompt: end with what asks for an answer.
        where: the conversation stands, for messages.

    Raises:
        SlimError: when the template refuses the conversation, or fails.
    """
    require_chat_template(tokenizer, "Put one into a file chat_template.jinja in its folder.")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is its maker's program and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SlimError(
            f"{where and where + ': '}The chat template of the model's tokenizer refuses a "
            f"conversation of {roles}: {reason.rstrip('.')}.\n{_advice(messages)}"
        ) from error


def _advice(messages: list[Message]) -> str:
    """Return what to change about a conversation that a template refuses."""
    roles = [message["role"] for message in messages]
    if "system" in roles:
        return "Use data without system messages, or change the template to take them."
    if any(first == second for first, second in zip(roles, roles[1:], strict=False)):
        return "Use data whose user and assistant turns alternate, or change the template."
    return "Use data whose turns the template takes, or change the template."
