"""DSKD: the teacher is compared with the student in both models' spaces, each through one of the
two heads.

Zhang et al., arXiv:2406.17328, and arXiv:2504.11426 for how the projectors begin. With hidden
states h_s, h_t, heads W_s, W_t and projectors P_ts (teacher to student), P_st:

    student's space:  p_ts = softmax(W_s P_ts h_t),  L_s = D(p_ts, q)            p_ts and W_s are constants here
                      L_p = -log p_ts(label)                                    teaches P_ts alone
    teacher's space:  q_st = softmax(W_t P_st h_s),  L_t = D(p, q_st)            teaches student and P_st
    L = (1 - w) (T^2 (L_s + L_t) + L_p) + w (-log q(label))                     w: weight of the hard labels

Each projector begins where one head on projected states comes closest to the other head on its own:
W_s P_ts ~ W_t on the shared vocabulary, P_ts = pinv(W_s) W_t; the identity where heads are the
same.

With different tokenizers there are no pairs of tokens. Cross-model attention aligns them, within a
text:

    Q = P_q [e_s(token); e_s(next)],  K = N([e_t(token); e_t(next)]),  S = Q K' / sqrt(2 d_t)
    h~_t = softmax(S) P_ts (N(h_t) + N(e_t(next)))   in place of P_ts h_t,   h~_s = softmax(S') P_st h_s   of P_st h_s

N divides by the standard deviation (here of each vector, so that nothing depends on the batch). L_s
counts only where the aligned teacher's most likely token is the label. e: input embeddings; P_q
begins where it maps shared tokens onto each other."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.data.packing import IGNORE
from slim.distillation.chunks import chunk_rows, chunked_sum
from slim.distillation.losses import Divergence, softened
from slim.distillation.objective import head_parameters
from slim.distillation.pairing import Rows, segments_of, teacher_batch
from slim.models.logits import head_logits
from slim.training.forward import counted, last_hidden, plain_model


@torch.no_grad()
def closest_map(own: Tensor, other: Tensor) -> Tensor:
    """Return the matrix M [d_own, d_other] with the smallest ||own M - other||, for [tokens,
    d_own], [tokens, d_other]."""
    own, other = own.double().cpu(), other.double().cpu()
    if own.shape == other.shape and torch.equal(own, other):
        return torch.eye(own.shape[1])
    # directions below 1e-5 of the largest are noise
    inverse = torch.linalg.pinv(own.T @ own, rtol=1e-10, hermitian=True)
    return (inverse @ (own.T @ other)).float()


def projector(matrix: Tensor) -> nn.Linear:
    """Return a trainable map x -> x M, for M [in, out]."""
    linear = nn.Linear(*matrix.shape, bias=False)
    linear.weight.data.copy_(matrix.T)
    return linear


def head_weight(model: nn.Module) -> Tensor:
    """Return the head's matrix [vocabulary, hidden] without adapters. Only plain heads have one
    that can be read."""
    head = model.get_output_embeddings()
    return getattr(head, "base_layer", head).weight


def head_projectors(
    student: nn.Module, teacher: nn.Module, ours: Tensor, theirs: Tensor
) -> dict[str, nn.Linear]:
    """Return P_ts and P_st. ours, theirs: ids of the shared tokens in both vocabularies, in the
    same order."""
    one, other = head_weight(student)[ours], head_weight(teacher)[theirs]
    return {
        "to_student": projector(closest_map(one, other).T),
        "to_teacher": projector(closest_map(other, one).T),
    }


def normalised(states: Tensor) -> Tensor:
    """Return N(x): each vector over its standard deviation."""
    return states / states.std(-1, keepdim=True).clamp_min(1e-6)


def attend(scores: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Return softmax(scores) values over the allowed columns: scores, allowed [n, m], values [m,
    d]."""
    # nothing allowed: zero
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num() @ values


class DualSpace(nn.Module):
    """DSKD for models with the same vocabulary, of any widths.

    projectors: ``to_student`` and ``to_teacher``. classes: how many logits count.
    """

    def __init__(
        self,
        teacher: nn.Module,
        projectors: dict[str, nn.Linear],
        divergence: Divergence,
        temperature: float,
        hard_weight: float,
        classes: tuple[int, int],
    ):
        super().__init__()
        self.teacher, self.projectors = teacher, nn.ModuleDict(projectors)
        self.divergence, self.temperature, self.hard_weight = divergence, temperature, hard_weight
        self.classes = classes

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        """Return the loss summed over the tokens with labels."""
        tokens, labels, positions = batch["tokens"], batch["labels"], batch.get("positions")
        with torch.no_grad():
            taught, _ = counted(last_hidden(self.teacher, tokens, positions), labels)
        hidden, target = counted(last_hidden(student, tokens, positions), labels)
        guide, guided = (
            self.projectors["to_student"](taught.float()),
            self.projectors["to_teacher"](hidden.float()),
        )
        ones = torch.ones(len(target), device=hidden.device)
        return self.student_space(
            plain_model(student), hidden, guide, target, ones
        ) + self.teacher_space(taught, guided, ones)

    def student_space(
        self,
        student: nn.Module,
        hidden: Tensor,
        projected: Tensor,
        target: Tensor,
        weights: Tensor,
        only_right: bool = False,
    ) -> Tensor:
        """Return what the student's head compares, summed; L_s and L_p with ``weights`` [tokens].

        only_right: L_s counts where p_ts is right.
        """
        frozen = frozen_head(student)

        def of_chunk(hidden: Tensor, projected: Tensor, target: Tensor, weights: Tensor) -> Tensor:
            logits = head_logits(student, hidden)[:, : self.classes[0]].float()
            guided = head_logits(frozen, projected.to(student.dtype))[:, : self.classes[0]].float()
            log_p = softened(guided.detach(), self.temperature)
            soft = self.divergence(log_p, softened(logits, self.temperature))
            soft = soft * (guided.argmax(-1) == target) if only_right else soft
            taught = self.temperature**2 * soft + F.cross_entropy(guided, target, reduction="none")
            total = (1 - self.hard_weight) * (weights * taught).sum()
            return total + self.hard_weight * F.cross_entropy(logits, target, reduction="sum")

        rows = (hidden, projected, target, weights)
        return chunked_sum(of_chunk, rows, head_parameters(student), chunk_rows(self.classes[0]))

    def teacher_space(self, taught: Tensor, projected: Tensor, weights: Tensor) -> Tensor:
        """Return what the teacher's head compares, summed with ``weights`` [tokens]."""

        def of_chunk(taught: Tensor, projected: Tensor, weights: Tensor) -> Tensor:
            with torch.no_grad():
                log_p = softened(
                    head_logits(self.teacher, taught)[:, : self.classes[1]], self.temperature
                )
            logits = head_logits(self.teacher, projected.to(self.teacher.dtype))[
                :, : self.classes[1]
            ]
            log_q = softened(logits, self.temperature)
            return (
                (1 - self.hard_weight)
                * self.temperature**2
                * (weights * self.divergence(log_p, log_q)).sum()
            )

        return chunked_sum(
            of_chunk, (taught, projected, weights), chunk=chunk_rows(self.classes[1])
        )


def frozen_head(model: nn.Module) -> SimpleNamespace:
    """Return what ``head_logits`` needs of ``model``, with the head's parameters as constants."""
    head = model.get_output_embeddings()
    constants = {name: parameter.detach() for name, parameter in head.named_parameters()}
    call = lambda hidden: torch.func.functional_call(head, constants, (hidden,))  # noqa: E731
    return SimpleNamespace(config=model.config, get_output_embeddings=lambda: call)


class ExactAlignment(DualSpace):
    """DSKD for models with different tokenizers, on tokens before which both have read the same
    text.

    There P_ts h_t and P_st h_s are compared as with one tokenizer; the student's other tokens have
    their hard labels alone.
    read: for every training window what the teacher reads. pairs: which tokens to compare
    (``alignment.py``). pad: a token of the teacher's."""

    def __init__(self, *settings, read: Rows, pairs: list[Tensor], pad: int):
        super().__init__(*settings)
        self.read, self.pairs, self.pad = read, pairs, pad

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        windows = batch["windows"].tolist()
        device = batch["tokens"].device
        beside = {
            name: value.to(device)
            for name, value in teacher_batch([self.read[w] for w in windows], self.pad).items()
        }
        with torch.no_grad():
            taught, _ = counted(
                last_hidden(self.teacher, beside["tokens"], beside["positions"]), beside["labels"]
            )
        hidden, target = counted(
            last_hidden(student, batch["tokens"], batch.get("positions")), batch["labels"]
        )
        ours, theirs = self.pairs_of(windows, batch["labels"], beside["labels"]).to(device)
        known = torch.zeros(len(target), device=device).index_fill(0, ours, 1.0)
        projected = self.projectors["to_student"](taught[theirs].float())
        guide = torch.zeros(len(target), projected.shape[1], device=device).index_copy(
            0, ours, projected
        )
        guided = self.projectors["to_teacher"](hidden[ours].float())
        in_student = self.student_space(plain_model(student), hidden, guide, target, known)
        return in_student + self.teacher_space(
            taught[theirs], guided, torch.ones(len(ours), device=device)
        )

    def pairs_of(self, windows: list[int], labels: Tensor, read_labels: Tensor) -> Tensor:
        """Return the pairs of some windows, numbered through all their tokens that count: int64 [2,
        pairs]."""
        sizes = [(found[:, 1:] != IGNORE).sum(1).cpu() for found in (labels, read_labels)]
        starts = torch.stack([size.cumsum(0) - size for size in sizes])  # [2, windows]
        return torch.cat(
            [self.pairs[window] + starts[:, row, None] for row, window in enumerate(windows)], 1
        )


class CrossModelAttention(DualSpace):
    """DSKD for models with different tokenizers. projectors: also ``query``, P_q.

    read: for every training window what the teacher reads. pad: a token of the teacher's.
    """

    def __init__(self, *settings, read: Rows, pad: int):
        super().__init__(*settings)
        self.read, self.pad = read, pad

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        device = batch["tokens"].device
        beside = teacher_batch(
            [self.read[window] for window in batch["windows"].tolist()], self.pad
        )
        beside = {name: tensor.to(device) for name, tensor in beside.items()}
        with torch.no_grad():
            taught = last_hidden(self.teacher, beside["tokens"], beside["positions"])
        hidden = last_hidden(student, batch["tokens"], batch.get("positions"))
        rows = [
            self.align(
                student, hidden[row], taught[row], batch_row(batch, row), batch_row(beside, row)
            )
            for row in range(len(hidden))
        ]
        ours, guide, target, theirs, guided, weights = (
            torch.cat(parts) for parts in zip(*rows, strict=True)
        )
        ones = torch.ones(len(target), device=device)
        in_student = self.student_space(
            plain_model(student), ours, guide, target, ones, only_right=True
        )
        return in_student + self.teacher_space(theirs, guided, weights)

    def align(
        self, student: nn.Module, hidden: Tensor, taught: Tensor, own: dict, read: dict
    ) -> tuple[Tensor, ...]:
        """Align one window: hidden [length, d_s], taught [other length, d_t].

        Returns h_s, h~_t, labels (one row per student's token with a label) and h_t, h~_s, weights
        (per teacher's). The weights give both sides the same sum: there are as many losses as the
        student has tokens."""
        counts, read_counts = own["labels"][1:] != IGNORE, read["labels"][1:] != IGNORE
        # these predict a token with a label
        h_s, h_t = hidden[:-1][counts], taught[:-1][read_counts]
        e_s, next_s = embedded(student, own["tokens"], counts)
        e_t, next_t = embedded(self.teacher, read["tokens"], read_counts)
        query = self.projectors["query"](torch.cat([e_s, next_s], -1))
        key = normalised(torch.cat([e_t, next_t], -1))
        scores = query @ key.T / math.sqrt(key.shape[-1])
        allowed = own["segments"][:-1][counts][:, None] == read["segments"][:-1][read_counts][None]
        value = self.projectors["to_student"](normalised(h_t.float()) + normalised(next_t))
        aligned_teacher = attend(scores, value, allowed)
        aligned_student = attend(scores.T, self.projectors["to_teacher"](h_s.float()), allowed.T)
        weights = torch.full((len(h_t),), len(h_s) / max(1, len(h_t)), device=h_t.device)
        return h_s, aligned_teacher, own["labels"][1:][counts], h_t, aligned_student, weights


def batch_row(batch: dict, row: int) -> dict[str, Tensor]:
    """Return tokens, labels and segments of one row."""
    segments = (
        batch["segments"]
        if "segments" in batch
        else segments_of(batch.get("positions"), batch["tokens"])
    )
    return {
        "tokens": batch["tokens"][row],
        "labels": batch["labels"][row],
        "segments": segments[row],
    }


@torch.no_grad()
def embedded(model: nn.Module, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input embeddings, float32, of the tokens that predict a label and of those
    predicted."""
    states = plain_model(model).get_input_embeddings()(tokens).float()
    return states[:-1][counts], states[1:][counts]


def query_projector(
    student: nn.Module, teacher: nn.Module, ours: Tensor, theirs: Tensor
) -> nn.Linear:
    """Return P_q, which maps the student's embeddings of shared tokens onto the teacher's as they
    stand in K."""
    one, other = (
        model.get_input_embeddings().weight[ids].float()
        for model, ids in ((student, ours), (teacher, theirs))
    )
    matrix = closest_map(one, normalised(other))
    return projector(torch.block_diag(matrix, matrix))
