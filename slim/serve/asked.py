"""What a request asks for: its JSON, looked at entry by entry, as what slim works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slim.core.errors import SlimError, did_you_mean
from slim.data.chat import Message
from slim.serve.model import ChatModel, TooLong
from slim.serve.problems import Refused, unsupported
from slim.serve.sampling import Sampling, setting_names

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# fields that say something to OpenAI's own servers, and change no answer
WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
)  # fmt: skip
# fields that slim does not support, with the values that ask for nothing
ONLY: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
COMPLETION_TOKENS = 16  # of OpenAI's completions, where a request does not say
MOST_PROMPTS = 16  # of one request


@dataclass
class Asked:
    """A request for answers.

    Attributes:
        model: who is asked.
        prompts: tokens of each prompt.
        sampling: settings of the answers.
        stream: send the text while it comes.
        usage: say at the end of a stream how many tokens there were.
        chat: whether it is a conversation.
        left_out: the oldest messages for which there was no room (``truncate_history``, slim's own
            field).
    """

    model: ChatModel
    prompts: list[list[int]]
    sampling: Sampling
    stream: bool
    usage: bool
    chat: bool
    left_out: int = 0


def read_request(body: Any, models: dict[str, ChatModel], most: int, chat: bool) -> Asked:
    """Return what a request asks for.

    Args:
        body: its JSON.
        models: name -> model.
        most: tokens of an answer, however many are asked for.
        chat: whether it is one for ``/v1/chat/completions``.

    Raises:
        Refused: it asks for something that cannot be.
    """
    if not isinstance(body, dict):
        raise Refused("The request must be a JSON object.")
    model = chosen_model(body.get("model"), models)
    check_fields(body, chat)
    sampling = read_sampling(body, model, chat)
    sampling = sampling.changed({"max_tokens": min(sampling.max_tokens or most, most)})
    left_out = 0
    try:
        if chat:
            messages = read_messages(model, body.get("messages"))
            if flag(body, "truncate_history"):
                ids, left_out = model.fitted(messages, sampling)
            else:
                ids = model.chat_ids(messages)
            prompts = [ids]
        else:
            prompts = text_prompts(model, body.get("prompt"))
        for ids in prompts:
            model.room(ids, sampling)
    except Refused:
        raise
    except SlimError as error:
        code = None
        if isinstance(error, TooLong):
            code = "context_length_exceeded"
        raise Refused(str(error), 400, code, prompt_field(chat)) from error
    options = body.get("stream_options") or {}
    return Asked(
        model=model,
        prompts=prompts,
        sampling=sampling,
        stream=flag(body, "stream"),
        usage=flag(options, "include_usage"),
        chat=chat,
        left_out=left_out,
    )


def chosen_model(name: Any, models: dict[str, ChatModel]) -> ChatModel:
    """Return the model that a request names; the only one where it names none."""
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if not isinstance(name, str) or name not in models:
        hint = did_you_mean(str(name), models)
        raise Refused(
            f"model={name}: must be one of {', '.join(models)}.{hint}",
            404,
            "model_not_found",
            "model",
        )
    return models[name]


def check_fields(body: dict, chat: bool) -> None:
    """Refuse fields that slim would have to leave unheeded."""
    known = {"model", "stream", "stream_options", "max_completion_tokens", *setting_names()}
    known.add(prompt_field(chat))
    if chat:
        known.add("truncate_history")
    for name, value in body.items():
        if value is None or name in known or name in WITHOUT_EFFECT:
            continue
        if value not in ONLY.get(name, ()):
            raise unsupported(name)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused("stream_options: must be a JSON object.", param="stream_options")


def prompt_field(chat: bool) -> str:
    """Return the name of the field with what is to be answered."""
    if chat:
        return "messages"
    return "prompt"


def flag(body: dict, name: str) -> bool:
    """Return a field that is true or false; false where it is missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name}={value}: must be true or false.", param=name)
    return bool(value)


def read_sampling(body: dict, model: ChatModel, chat: bool) -> Sampling:
    """Return the settings of the answers: the model's own, changed by those of the request."""
    settings = {name: body.get(name) for name in setting_names()}
    longest = body.get("max_completion_tokens")
    if longest is not None:
        settings["max_tokens"] = longest
    if settings["max_tokens"] is None and not chat:
        settings["max_tokens"] = COMPLETION_TOKENS
    stop = settings["stop"]
    if isinstance(stop, str):
        settings["stop"] = (stop,)
    elif isinstance(stop, list):
        settings["stop"] = tuple(stop)
    elif stop is not None:
        raise Refused("stop: must be a text or a list of texts.", param="stop")
    try:
        return model.defaults.changed(settings)
    except SlimError as error:
        name = str(error).split("=")[0].split(":")[0]  # messages begin with the setting
        if name not in settings:
            name = None
        raise Refused(str(error), param=name) from error


def read_messages(model: ChatModel, messages: Any) -> list[Message]:
    """Return the messages of a conversation with a model that takes some."""
    if not isinstance(messages, list) or not messages:
        raise Refused("messages: must be a list of one message at least.", param="messages")
    if not model.chats:
        raise Refused(
            f"{model.name} has no chat template. Ask it by /v1/completions, or put a "
            "chat_template.jinja into its folder.",
            param="model",
        )
    return [read_message(entry, place) for place, entry in enumerate(messages)]


def read_message(entry: Any, place: int) -> Message:
    """Return a message of a request.

    Args:
        entry: its JSON.
        place: in the list.
    """
    where = f"messages[{place}]"
    if not isinstance(entry, dict):
        raise Refused(f"{where}: must be an object with role and content.", param=where)
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(f"{where}.role={role}: must be one of {', '.join(ROLES)}.", param=where)
    if entry.get("tool_calls") or entry.get("function_call"):
        raise unsupported(f"{where}.tool_calls")
    return {"role": ROLES[role], "content": read_content(entry.get("content"), where)}


def read_content(content: Any, where: str) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Refused(f"{where}.content: must be a text.", param=where)
    texts = []
    for part in content:
        kind = None
        if isinstance(part, dict):
            kind = part.get("type")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Refused(
                f"{where}.content: has a part of type {kind}. Give parts of type text only.",
                param=where,
            )
        texts.append(part["text"])
    return "".join(texts)


def text_prompts(model: ChatModel, prompt: Any) -> list[list[int]]:
    """Return the tokens of every prompt of a completion: a text, several texts, or tokens."""
    if isinstance(prompt, str):
        return [model.text_ids(prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt: must be a text, a list of texts, or a list of tokens.",
                      param="prompt")  # fmt: skip
    if all(isinstance(entry, str) for entry in prompt):
        if len(prompt) > MOST_PROMPTS:
            raise Refused(
                f"prompt: has {len(prompt)} texts. Give at most {MOST_PROMPTS}.", param="prompt"
            )
        return [model.text_ids(text) for text in prompt]
    for token in prompt:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not whole or not 0 <= token < model.vocabulary:
            raise Refused(f"prompt: {token!r} is no token of {model.name}.", param="prompt")
    return [prompt]
