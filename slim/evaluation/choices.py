"""Log-likelihoods of several answers to the same question, for which the question is read once.

lm-eval reads the question again for every choice. Here the tokens of a question q and of its
answers a, b, ... form one row::

    q1 q2 q3 a1 a2 b1 b2 b3

in which every token sees the question and what comes before it in its own answer, and has the
position it would have without the other answers. The numbers are those of separate rows, up to
rounding. A question of 30 tokens with four answers of 6 then costs 54 tokens instead of 144. The
head runs on the tokens that predict an answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from slim.evaluation.perplexity import LOGITS_AT_ONCE
from slim.models.logits import head_logits
from slim.models.spec import FAMILIES

TOKENS_AT_ONCE = 8192  # in one forward pass on a GPU, where no number of answers is given
PADDING, QUESTION = -1, 0  # segments of a row; its answers are 1, 2, ...


@dataclass
class Row:
    """A question with its answers.

    Attributes:
        question: its tokens, one at least.
        answers: the tokens of each answer, one at least.
        places: where each answer stands among those asked for.
    """

    question: tuple[int, ...]
    answers: list[list[int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """What is read: the last token of an answer predicts nothing."""
        return len(self.question) + sum(len(answer) - 1 for answer in self.answers)


def fits(model, requests: Sequence[tuple], max_length: int) -> bool:
    """Whether answers can be scored here.

    Args:
        model: a torch module of transformers.
        requests: (texts, tokens of the question, tokens of the answer) of each answer.
        max_length: tokens that the model has room for.

    Returns:
        False where the head is not one matrix that slim knows, a question has to be cut, tokens
        are so many that not each sees all before it, or a text has no question: lm-eval asks for
        the windows of a document like that.
    """
    if any(texts is None for texts, _, _ in requests):
        return False
    if model.config.model_type not in FAMILIES:
        return False
    room = min(max_length, getattr(model.config, "sliding_window", None) or max_length)
    return all(len(question) + len(answer) - 1 <= room for _, question, answer in requests)


def score(
    model,
    requests: Sequence[tuple],
    answers_at_once: int | None,
    advance: Callable[[int], object],
) -> list[tuple[float, bool]]:
    """Score answers.

    Args:
        model: a torch module of transformers.
        requests: (texts, tokens of the question, tokens of the answer) of each answer.
        answers_at_once: answers in one forward pass, about; None: by their tokens.
        advance: is told how many more answers are done.

    Returns:
        For each answer its log-likelihood in nats, and whether it is what the model itself would
        have said, token by token.
    """
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch in batches(rows_of(requests), answers_at_once):
        places = []
        for row in batch:
            places.extend(row.places)
        for place, result in zip(places, _score_batch(model, batch), strict=True):
            scores[place] = result
        advance(len(places))
    return scores


def rows_of(requests: Sequence[tuple]) -> list[Row]:
    """Return the answers by their questions, the longest first: the first batch needs the most
    memory, and rows of a batch are about as long."""
    rows: dict[tuple[int, ...], Row] = {}
    for place, (_, question, answer) in enumerate(requests):
        row = rows.setdefault(tuple(question), Row(tuple(question)))
        row.answers.append(list(answer))
        row.places.append(place)
    return sorted(rows.values(), key=lambda row: -row.tokens)


def batches(rows: list[Row], answers_at_once: int | None) -> list[list[Row]]:
    """Cut rows into batches of so many answers, or where None of so many tokens that a GPU is
    busy; a row is never cut."""
    limit = answers_at_once or TOKENS_AT_ONCE
    cut: list[list[Row]] = []
    size = limit
    for row in rows:
        added = len(row.answers) if answers_at_once else row.tokens
        if size + added > limit:
            cut.append([])
            size = 0
        cut[-1].append(row)
        size += added
    return cut


def _score_batch(model, rows: list[Row]) -> list[tuple[float, bool]]:
    """Return the score of every answer of some rows, in their order."""
    length = max(row.tokens for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.full((len(rows), length), PADDING)
    positions = torch.zeros_like(ids)
    predicting: list[int] = []  # flat places of the tokens that predict an answer
    wanted: list[int] = []  # the tokens they should predict
    for number, row in enumerate(rows):
        end = len(row.question)
        ids[number, :end] = torch.tensor(row.question)
        segments[number, :end] = QUESTION
        positions[number, :end] = torch.arange(end)
        start = number * length
        for segment, answer in enumerate(row.answers, 1):
            read = len(answer) - 1
            ids[number, end : end + read] = torch.tensor(answer[:-1], dtype=torch.long)
            segments[number, end : end + read] = segment
            first = len(row.question)
            positions[number, end : end + read] = torch.arange(first, first + read)
            # the question's last token predicts the first of every answer
            predicting.append(start + first - 1)
            predicting.extend(range(start + end, start + end + read))
            wanted.extend(answer)
            end += read
    device = model.device
    with torch.inference_mode():
        hidden = model.base_model(
            input_ids=ids.to(device),
            attention_mask=visible(segments, model.dtype).to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        hidden = hidden[torch.tensor(predicting, device=device)]
        target = torch.tensor(wanted, device=device)
        taken, same = [], []
        size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        for states, tokens in zip(hidden.split(size), target.split(size), strict=True):
            log_p = head_logits(model, states).float().log_softmax(-1)
            taken.append(log_p.gather(1, tokens[:, None])[:, 0].cpu())
            same.append((log_p.argmax(-1) == tokens).cpu())
        taken, same = torch.cat(taken), torch.cat(same)
    results = []
    start = 0
    for row in rows:
        for answer in row.answers:
            part = slice(start, start + len(answer))
            results.append((float(taken[part].sum()), bool(same[part].all())))
            start += len(answer)
    return results


def visible(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what each token sees, as a mask that is added to attention scores.

    Args:
        segments: int64 [rows, tokens]: ``QUESTION``, the number of an answer, or ``PADDING``.
        dtype: of the mask.

    Returns:
        [rows, 1, tokens, tokens]: 0 for the question and the token's own answer up to the token
        itself, else the lowest number of the type. Padding sees itself, so that no row of the
        attention is empty.
    """
    length = segments.shape[1]
    seen = (segments[:, None, :] == QUESTION) | (segments[:, None, :] == segments[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[:, None]
