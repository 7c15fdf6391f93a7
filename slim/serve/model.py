"""A loaded model that answers: what it is asked as tokens, its answer as text while it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.core.hardware import available_memory
from slim.core.lazy import LazyModule
from slim.core.text import gigabytes
from slim.data.chat import Message, has_chat_template, render_chat
from slim.evaluation.memory import cache_bytes, weights_bytes
from slim.models.spec import resolve_dtype
from slim.quantization.storage import weight_bytes
from slim.serve.sampling import Sampler, Sampling, recommended
from slim.serve.text import TextStream

if TYPE_CHECKING:
    import torch

    from slim.serve.resolve import Named
else:
    torch = LazyModule("torch")

READ_AT_ONCE = 512  # tokens of a prompt: bounds memory, and how late a stop is noticed
ANSWER_SHARE = 4  # where history is left out, one fourth of the context is for the answer
PROBE = "Zebra crossing ahead"  # said by a system to see whether a template writes it


class TooLong(SlimError):
    """A prompt that the context has no room for."""


@dataclass
class Answer:
    """What is known of an answer, complete when its text is.

    Attributes:
        prompt_tokens: read before it.
        tokens: written, the one that ended it not counted.
        finish_reason: ``stop`` (the model or a stop text ended it), ``length`` (no more tokens
            were allowed or had room) or ``cancelled``; None while it comes.
        reading: seconds from the beginning to the first token.
        writing: seconds from the first token to the last.
        cache_bytes: keys and values held at the end.
    """

    prompt_tokens: int
    tokens: int = 0
    finish_reason: str | None = None
    reading: float = 0.0
    writing: float = 0.0
    cache_bytes: int = 0

    @property
    def reading_rate(self) -> float:
        """Tokens of the prompt per second."""
        if not self.reading:
            return 0.0
        return self.prompt_tokens / self.reading

    @property
    def writing_rate(self) -> float:
        """Tokens after the first one per second; 0 where there is none."""
        if not self.writing or self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / self.writing


@dataclass
class ChatModel:
    """A model ready to answer.

    Attributes:
        name: for requests and headings.
        chain: what made it; may be empty.
        model: a torch module of transformers.
        tokenizer: of transformers.
        context: tokens of prompt and answer together.
        vocabulary: number of tokens that it knows.
        ends: tokens that end an answer.
        defaults: settings of an answer for which none are given.
        weights: bytes of its tensors.
        dtype: computed in.
        takes_system: whether its chat template writes what a system says.
    """

    name: str
    chain: str
    model: torch.nn.Module
    tokenizer: object
    context: int
    vocabulary: int
    ends: set[int]
    defaults: Sampling
    weights: int
    dtype: str
    takes_system: bool = True
    # a fast tokenizer must not encode and decode at the same time
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return has_chat_template(self.tokenizer)

    def chat_ids(self, messages: list[Message]) -> list[int]:
        """Return a conversation as tokens, up to where the answer begins.

        Args:
            messages: with ``role`` and ``content``.

        Raises:
            SlimError: the model has no chat template, or that refuses the conversation.
        """
        if not self.takes_system and any(entry["role"] == "system" for entry in messages):
            raise SlimError(
                f"The chat template of {self.name} leaves out what a system says. Put it into the "
                "first question, or change the template."
            )
        text = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        # the template writes the special tokens itself
        return self._encoded(text, add_special_tokens=False)

    def text_ids(self, text: str) -> list[int]:
        """Return a text to be continued as tokens; one at least, which begins or ends a text."""
        ids = self._encoded(text)
        if ids:
            return ids
        for token in (self.tokenizer.bos_token_id, *sorted(self.ends)):
            if token is not None:
                return [token]
        raise SlimError("The prompt is empty, and the model has no token that begins a text.")

    def _encoded(self, text: str, **settings) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SlimError(
                "The text holds half a character (a lone surrogate). Send UTF-8."
            ) from error
        with self._lock:
            return list(self.tokenizer(text, **settings)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        with self._lock:
            return self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )

    def room(self, ids: list[int], sampling: Sampling) -> int:
        """Return how many tokens an answer may have.

        Args:
            ids: the prompt.
            sampling: which may allow fewer than there is room for.

        Raises:
            TooLong: there is none.
        """
        room = self.context - len(ids)
        if room < 1:
            raise TooLong(
                f"The prompt has {len(ids)} tokens, and {self.name} has a context of "
                f"{self.context} for prompt and answer. Shorten it."
            )
        if sampling.max_tokens is None:
            return room
        return min(room, sampling.max_tokens)

    def fitted(self, messages: list[Message], sampling: Sampling) -> tuple[list[int], int]:
        """Return a conversation as tokens, without the oldest turns where they leave no room for
        an answer: a fourth of the context, or as many tokens as it may have.

        Args:
            messages: the last one is what is to be answered.
            sampling: settings of the answer.

        Returns:
            Tokens, and how many messages were left out.

        Raises:
            SlimError: what is to be answered has no room by itself.
        """
        wanted = min(sampling.max_tokens or self.context, self.context // ANSWER_SHARE)
        first = 0
        while first < len(messages) and messages[first]["role"] == "system":
            first += 1
        # a conversation begins with a question
        begins = [first]
        for place in range(first + 1, len(messages)):
            if messages[place]["role"] == "user":
                begins.append(place)
        for begin in begins:
            ids = self.chat_ids([*messages[:first], *messages[begin:]])
            if len(ids) + wanted <= self.context:
                break
        self.room(ids, sampling)
        return ids, begin - first

    def answer(
        self,
        ids: list[int],
        sampling: Sampling,
        answer: Answer,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece.

        Args:
            ids: the prompt, one token at least.
            sampling: settings of the answer.
            answer: is filled in.
            cancelled: is asked before each step; true ends the answer there.

        Raises:
            SlimError: the prompt has no room, or the model computes no numbers.
        """
        room = self.room(ids, sampling)
        sampler = Sampler(sampling, ids)
        stream = TextStream(self._decoded, sampling.stop)
        started = time.perf_counter()
        logits, cache = self._read(ids, cancelled)
        while logits is not None and not cancelled():
            token = sampler.choose(logits)
            now = time.perf_counter()
            if not answer.reading:
                answer.reading = now - started
            answer.writing = now - started - answer.reading
            if token in self.ends:
                answer.finish_reason = "stop"
                break
            answer.tokens += 1
            piece = stream.add(token)
            if piece:
                yield piece
            if stream.stopped:
                answer.finish_reason = "stop"
                break
            if answer.tokens >= room:
                answer.finish_reason = "length"
                break
            logits, cache = self._step([token], cache)
        answer.finish_reason = answer.finish_reason or "cancelled"
        if cache is not None:
            answer.cache_bytes = cache_bytes(cache)
        piece = stream.finish()
        if piece:
            yield piece

    def _read(self, ids: list[int], cancelled: Callable[[], bool]) -> tuple:
        """Read a prompt in parts; returns logits of the last token and the cache, None for the
        logits where it was cancelled meanwhile."""
        logits = cache = None
        for start in range(0, len(ids), READ_AT_ONCE):
            if cancelled():
                return None, cache
            logits, cache = self._step(ids[start : start + READ_AT_ONCE], cache)
        return logits, cache

    def _step(self, ids: list[int], cache) -> tuple:
        """Return the logits after some tokens, [vocabulary], and the cache that has them."""
        settings = {"use_cache": True, "logits_to_keep": 1}
        # some models take None for the cache of another forward pass
        if cache is not None:
            settings["past_key_values"] = cache
        # around the step alone: the mode belongs to the thread, which others use between two steps
        with torch.inference_mode():
            output = self.model(input_ids=torch.tensor([ids], device=self.model.device), **settings)
        return output.logits[0, -1], output.past_key_values


def load(named: Named, device: str, dtype: str, context: int | None = None) -> ChatModel:
    """Load a model.

    Args:
        named: which.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: type to compute in; ``"auto"``: float32 on a CPU, the stored type elsewhere.
        context: most tokens of prompt and answer; None: the model's own context.

    Raises:
        SlimError: it cannot be loaded.
    """
    from slim.checkpoints.tokenizer import load_tokenizer
    from slim.evaluation.generation import end_tokens
    from slim.loading.load_model import load_model

    spec = named.checkpoint.spec
    own_context = spec.context_length
    if context is not None and context > own_context:
        raise SlimError(
            f"--context {context}: {named.name} has room for {own_context} tokens. Use at most "
            "that many."
        )
    tokenizer = load_tokenizer(named.checkpoint.folder)
    model = load_model(named.checkpoint.folder, dtype, device)
    ends = end_tokens(model, tokenizer)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return ChatModel(
        name=named.name,
        chain=named.chain,
        model=model,
        tokenizer=tokenizer,
        context=context or own_context,
        vocabulary=spec.vocab_size,
        ends=ends,
        defaults=recommended(getattr(model, "generation_config", None)),
        weights=weights_bytes(model),
        dtype=resolve_dtype(spec, dtype, device),
        takes_system=writes_system(tokenizer),
    )


def compute_dtype(dtype: str, device: str, store: str) -> str:
    """Return the type to compute in: ``"auto"`` on a CPU is what is faster on this machine.

    Args:
        dtype: as the user gave it.
        device: ``"cpu"`` or ``"cuda"``.
        store: folder of results, which keeps the measurement if it is there.
    """
    from slim.evaluation.machine import DTYPES, faster, generation_seconds, machine_dtype

    if dtype != "auto" or device != "cpu":
        return dtype
    kept = Store(store)
    if kept.root.is_dir():
        return machine_dtype(kept)
    return faster({name: generation_seconds(name) for name in DTYPES})


def writes_system(tokenizer) -> bool:
    """Whether a chat template writes what a system says; some leave it out without a word."""
    if not has_chat_template(tokenizer):
        return True
    messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "Hello"}]
    try:
        return PROBE in render_chat(tokenizer, messages)
    except SlimError:  # it refuses by itself, with its own reason
        return True


def require_memory(models: list[Named], device: str, dtype: str) -> None:
    """Require room for the weights of all models before the first is loaded.

    Raises:
        SlimError: with what is needed and what is free.
    """
    needed = 0
    for named in models:
        spec = named.checkpoint.spec
        method = (spec.quantization or {}).get("quant_method")
        wanted = resolve_dtype(spec, dtype, device)
        if method not in (None, "gguf"):  # stays packed in memory, as in the files
            wanted = None
        needed += weight_bytes(spec, wanted)
    free = available_memory(device)
    if free is not None and needed > free:
        raise SlimError(
            f"The weights need about {gigabytes(needed)}, and {gigabytes(free)} are free on "
            f"{device}. Give fewer or smaller models, or --dtype bfloat16."
        )
