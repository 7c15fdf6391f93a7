"""DSKD: the teacher is compared with the student in both models' spaces, each through one of the
two heads.

Zhang et al., arXiv:2406.17328, and arXiv:2504.11426 for how the projectors begin. With hidden
states h_s, h_t, heads W_s, W_t and projectors P_ts (teacher to student), P_st:

    student's space:  p_ts = softmax(W_s P_ts h_t), a constant here like W_s
                      L_s = D(p_ts, q)
                      L_p = -log p_ts(label)             teaches P_ts alone
    teacher's space:  q_st = softmax(W_t P_st h_s)
                      L_t = D(p, q_st)                   teaches student and P_st
    L = (1 - w) (T^2 (L_s + L_t) + L_p) + w (-log q(label))

w is the weight of the hard labels. Each projector begins where one head on projected states comes
closest to the other head on its own: W_s P_ts ~ W_t on the shared vocabulary, P_ts = pinv(W_s) W_t;
the identity where heads are the same.

With different tokenizers there are no pairs of tokens. Cross-model attention aligns them, within a
text:

    Q = P_q [e_s(token); e_s(next)],  K = N([e_t(token); e_t(next)]),  S = Q K' / sqrt(2 d_t)
    h~_t = softmax(S) P_ts (N(h_t) + N(e_t(next)))       instead of P_ts h_t
    h~_s = softmax(S') P_st h_s                          instead of P_st h_s

N divides by the standard deviation (here of each vector, so that nothing depends on the batch). L_s
counts only where the aligned teacher's most likely token is the label. e: input embeddings; P_q
begins where it maps shared tokens onto each other.
"""

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
def closest_map(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the matrix M [d_in, d_out] with the smallest ||inputs M - outputs||.

    Args:
        inputs: [tokens, d_in].
        outputs: [tokens, d_out].
    """
    inputs, outputs = inputs.double().cpu(), outputs.double().cpu()
    if inputs.shape == outputs.shape and torch.equal(inputs, outputs):
        return torch.eye(inputs.shape[1])
    # Directions below 1e-5 of the largest are noise.
    inverse = torch.linalg.pinv(inputs.T @ inputs, rtol=1e-10, hermitian=True)
    return (inverse @ (inputs.T @ outputs)).float()


def projector(matrix: Tensor) -> nn.Linear:
    """Return a trainable map x -> x M.

    Args:
        matrix: M, [in, out].
    """
    linear = nn.Linear(*matrix.shape, bias=False)
    linear.weight.data.copy_(matrix.T)
    return linear


def head_weight(model: nn.Module) -> Tensor:
    """Return the head's matrix [vocabulary, hidden size] without adapters.

    Args:
        model: With a plain head; only these have a matrix that can be read.
    """
    head = model.get_output_embeddings()
    return getattr(head, "base_layer", head).weight


def head_projectors(
    student: nn.Module, teacher: nn.Module, student_ids: Tensor, teacher_ids: Tensor
) -> dict[str, nn.Linear]:
    """Return P_ts as ``to_student`` and P_st as ``to_teacher``.

    Args:
        student: The student's model.
        teacher: The teacher's model.
        student_ids: int64 [shared], the shared tokens in the student's vocabulary.
        teacher_ids: int64 [shared], the same tokens in the teacher's.
    """
    student_head = head_weight(student)[student_ids]
    teacher_head = head_weight(teacher)[teacher_ids]
    return {
        "to_student": projector(closest_map(student_head, teacher_head).T),
        "to_teacher": projector(closest_map(teacher_head, student_head).T),
    }


def normalised(states: Tensor) -> Tensor:
    """Return N(x): each vector over its standard deviation.

    Args:
        states: [..., d].
    """
    return states / states.std(-1, keepdim=True).clamp_min(1e-6)


def attend(scores: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Return softmax(scores) values over the allowed columns, [n, d]; zero where none is allowed.

    Args:
        scores: [n, m].
        values: [m, d].
        allowed: bool [n, m].
    """
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.nan_to_num() @ values


class DualSpace(nn.Module):
    """DSKD for models with the same vocabulary, of any widths."""

    def __init__(
        self,
        teacher: nn.Module,
        projectors: dict[str, nn.Linear],
        divergence: Divergence,
        temperature: float,
        hard_weight: float,
        classes: tuple[int, int],
    ):
        """Put the parts together.

        Args:
            teacher: Frozen.
            projectors: ``to_student`` and ``to_teacher``.
            divergence: D, see ``losses.py``.
            temperature: T.
            hard_weight: w, 0 to 1.
            classes: How many of the student's and of the teacher's logits count.
        """
        super().__init__()
        self.teacher = teacher
        self.projectors = nn.ModuleDict(projectors)
        self.divergence = divergence
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.classes = classes

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        """Return the loss summed over the tokens with labels.

        Args:
            student: Plain or wrapped by PEFT.
            batch: ``tokens``, ``labels`` and perhaps ``positions``, int64 [rows, length].
        """
        tokens, labels, positions = batch["tokens"], batch["labels"], batch.get("positions")
        with torch.no_grad():
            taught, _ = counted(last_hidden(self.teacher, tokens, positions), labels)
        hidden, target = counted(last_hidden(student, tokens, positions), labels)
        guide = self.projectors["to_student"](taught.float())
        guided = self.projectors["to_teacher"](hidden.float())
        ones = torch.ones(len(target), device=hidden.device)
        in_student = self.student_space(plain_model(student), hidden, guide, target, ones)
        return in_student + self.teacher_space(taught, guided, ones)

    def student_space(
        self,
        student: nn.Module,
        hidden: Tensor,
        projected: Tensor,
        target: Tensor,
        weights: Tensor,
        only_right: bool = False,
    ) -> Tensor:
        """Return what the student's head compares, summed over the tokens.

        Args:
            student: Plain.
            hidden: [tokens, d_s], h_s.
            projected: [tokens, d_s], P_ts h_t or h~_t.
            target: int64 [tokens], the labels.
            weights: [tokens], of L_s and L_p.
            only_right: Let L_s count only where p_ts is right.
        """
        frozen = frozen_head(student)
        classes = self.classes[0]

        def of_chunk(hidden: Tensor, projected: Tensor, target: Tensor, weights: Tensor) -> Tensor:
            logits = head_logits(student, hidden)[:, :classes].float()
            guided = head_logits(frozen, projected.to(student.dtype))[:, :classes].float()
            log_p = softened(guided.detach(), self.temperature)
            soft = self.divergence(log_p, softened(logits, self.temperature))
            if only_right:
                soft = soft * (guided.argmax(-1) == target)
            taught = self.temperature**2 * soft + F.cross_entropy(guided, target, reduction="none")
            total = (1 - self.hard_weight) * (weights * taught).sum()
            return total + self.hard_weight * F.cross_entropy(logits, target, reduction="sum")

        rows = (hidden, projected, target, weights)
        return chunked_sum(of_chunk, rows, head_parameters(student), chunk_rows(classes))

    def teacher_space(self, taught: Tensor, projected: Tensor, weights: Tensor) -> Tensor:
        """Return what the teacher's head compares, summed over the tokens.

        Args:
            taught: [tokens, d_t], h_t.
            projected: [tokens, d_t], P_st h_s or h~_s.
            weights: [tokens], of L_t.
        """
        classes = self.classes[1]
        factor = (1 - self.hard_weight) * self.temperature**2

        def of_chunk(taught: Tensor, projected: Tensor, weights: Tensor) -> Tensor:
            with torch.no_grad():
                logits = head_logits(self.teacher, taught)[:, :classes]
                log_p = softened(logits, self.temperature)
            guided = head_logits(self.teacher, projected.to(self.teacher.dtype))[:, :classes]
            log_q = softened(guided, self.temperature)
            return factor * (weights * self.divergence(log_p, log_q)).sum()

        return chunked_sum(of_chunk, (taught, projected, weights), chunk=chunk_rows(classes))

    def read_by_teacher(self, batch: dict) -> dict[str, Tensor]:
        """Return what the teacher reads for the windows of a batch, on its device; only with
        different tokenizers.

        Args:
            batch: With the numbers of its ``windows``.
        """
        rows = [self.read[window] for window in batch["windows"].tolist()]
        device = batch["tokens"].device
        return {name: value.to(device) for name, value in teacher_batch(rows, self.pad).items()}


def frozen_head(model: nn.Module) -> SimpleNamespace:
    """Return what ``head_logits`` needs of a model, with the head's parameters as constants.

    Args:
        model: Plain.
    """
    head = model.get_output_embeddings()
    constants = {name: parameter.detach() for name, parameter in head.named_parameters()}

    def call(hidden: Tensor) -> Tensor:
        return torch.func.functional_call(head, constants, (hidden,))

    return SimpleNamespace(config=model.config, get_output_embeddings=lambda: call)


class ExactAlignment(DualSpace):
    """DSKD for models with different tokenizers, on tokens before which both have read the same
    text.

    There P_ts h_t and P_st h_s are compared as with one tokenizer; the student's other tokens have
    their hard labels alone.
    """

    def __init__(self, *settings, read: Rows, pairs: list[Tensor], pad: int):
        """Put the parts together.

        Args:
            *settings: Those of :class:`DualSpace`.
            read: For every training window what the teacher reads.
            pairs: For every training window which tokens to compare, int64 [2, pairs]
                (``alignment.py``).
            pad: A token of the teacher's.
        """
        super().__init__(*settings)
        self.read = read
        self.pairs = pairs
        self.pad = pad

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        device = batch["tokens"].device
        read = self.read_by_teacher(batch)
        with torch.no_grad():
            states = last_hidden(self.teacher, read["tokens"], read["positions"])
            taught, _ = counted(states, read["labels"])
        states = last_hidden(student, batch["tokens"], batch.get("positions"))
        hidden, target = counted(states, batch["labels"])
        pairs = self.pairs_of(batch["windows"].tolist(), batch["labels"], read["labels"])
        ours, theirs = pairs.to(device)
        known = torch.zeros(len(target), device=device).index_fill(0, ours, 1.0)
        projected = self.projectors["to_student"](taught[theirs].float())
        # Tokens without a partner have weight 0 and a row of zeros.
        guide = torch.zeros(len(target), projected.shape[1], device=device)
        guide = guide.index_copy(0, ours, projected)
        guided = self.projectors["to_teacher"](hidden[ours].float())
        ones = torch.ones(len(ours), device=device)
        in_student = self.student_space(plain_model(student), hidden, guide, target, known)
        return in_student + self.teacher_space(taught[theirs], guided, ones)

    def pairs_of(self, windows: list[int], labels: Tensor, read_labels: Tensor) -> Tensor:
        """Return the pairs of some windows, numbered through all their tokens that count.

        Args:
            windows: Their numbers.
            labels: int64 [windows, length], the student's.
            read_labels: int64 [windows, length], the teacher's.

        Returns:
            int64 [2, pairs].
        """
        starts = torch.stack([first_counted(labels), first_counted(read_labels)])  # [2, windows]
        numbered = [self.pairs[window] + starts[:, row, None] for row, window in enumerate(windows)]
        return torch.cat(numbered, 1)


def first_counted(labels: Tensor) -> Tensor:
    """Return how many tokens count in the rows before each, int64 [rows].

    Args:
        labels: int64 [rows, length].
    """
    sizes = (labels[:, 1:] != IGNORE).sum(1).cpu()
    return sizes.cumsum(0) - sizes


class CrossModelAttention(DualSpace):
    """DSKD for models with different tokenizers, with the learned attention of the paper."""

    def __init__(self, *settings, read: Rows, pad: int):
        """Put the parts together.

        Args:
            *settings: Those of :class:`DualSpace`; the projectors have ``query`` too, P_q.
            read: For every training window what the teacher reads.
            pad: A token of the teacher's.
        """
        super().__init__(*settings)
        self.read = read
        self.pad = pad

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        read = self.read_by_teacher(batch)
        with torch.no_grad():
            taught = last_hidden(self.teacher, read["tokens"], read["positions"])
        hidden = last_hidden(student, batch["tokens"], batch.get("positions"))
        rows: list[tuple[Tensor, ...]] = []
        for row in range(len(hidden)):
            own = batch_row(batch, row)
            rows.append(self.align(student, hidden[row], taught[row], own, batch_row(read, row)))
        ours, guide, target, theirs, guided, weights = (
            torch.cat(parts) for parts in zip(*rows, strict=True)
        )
        ones = torch.ones(len(target), device=batch["tokens"].device)
        in_student = self.student_space(
            plain_model(student), ours, guide, target, ones, only_right=True
        )
        return in_student + self.teacher_space(theirs, guided, weights)

    def align(
        self, student: nn.Module, hidden: Tensor, taught: Tensor, own: dict, read: dict
    ) -> tuple[Tensor, ...]:
        """Align one window.

        Args:
            student: Plain or wrapped by PEFT.
            hidden: [length, d_s], the student's last hidden states.
            taught: [length of what the teacher reads, d_t], the teacher's.
            own: What the student reads, as :func:`batch_row` gives it.
            read: What the teacher reads, likewise.

        Returns:
            h_s, h~_t, labels (one row per token of the student's with a label) and h_t, h~_s,
            weights (one per token of the teacher's). The weights give both sides the same sum:
            there are as many losses as the student has tokens.
        """
        counts = own["labels"][1:] != IGNORE
        read_counts = read["labels"][1:] != IGNORE
        # These predict a token with a label.
        h_s = hidden[:-1][counts]
        h_t = taught[:-1][read_counts]
        e_s, next_s = embedded(student, own["tokens"], counts)
        e_t, next_t = embedded(self.teacher, read["tokens"], read_counts)
        query = self.projectors["query"](torch.cat([e_s, next_s], -1))
        key = normalised(torch.cat([e_t, next_t], -1))
        scores = query @ key.T / math.sqrt(key.shape[-1])
        segments = own["segments"][:-1][counts]
        read_segments = read["segments"][:-1][read_counts]
        allowed = segments[:, None] == read_segments[None]
        value = self.projectors["to_student"](normalised(h_t.float()) + normalised(next_t))
        aligned_teacher = attend(scores, value, allowed)
        aligned_student = attend(scores.T, self.projectors["to_teacher"](h_s.float()), allowed.T)
        weights = torch.full((len(h_t),), len(h_s) / max(1, len(h_t)), device=h_t.device)
        return h_s, aligned_teacher, own["labels"][1:][counts], h_t, aligned_student, weights


def batch_row(batch: dict, row: int) -> dict[str, Tensor]:
    """Return ``tokens``, ``labels`` and ``segments`` of one row, each int64 [length].

    Args:
        batch: A micro-batch of the student's or what the teacher reads.
        row: Its number.
    """
    segments = batch.get("segments")
    if segments is None:
        segments = segments_of(batch.get("positions"), batch["tokens"])
    return {
        "tokens": batch["tokens"][row],
        "labels": batch["labels"][row],
        "segments": segments[row],
    }


@torch.no_grad()
def embedded(model: nn.Module, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input embeddings, float32 [counted, d], of the tokens that predict a label and of
    those predicted.

    Args:
        model: Plain or wrapped by PEFT.
        tokens: int64 [length].
        counts: bool [length - 1], where the next token has a label.
    """
    states = plain_model(model).get_input_embeddings()(tokens).float()
    return states[:-1][counts], states[1:][counts]


def query_projector(
    student: nn.Module, teacher: nn.Module, student_ids: Tensor, teacher_ids: Tensor
) -> nn.Linear:
    """Return P_q, which maps the student's embeddings of shared tokens onto the teacher's as they
    stand in K.

    Args:
        student: The student's model.
        teacher: The teacher's model.
        student_ids: int64 [shared], the shared tokens in the student's vocabulary.
        teacher_ids: int64 [shared], the same tokens in the teacher's.
    """
    student_rows = student.get_input_embeddings().weight[student_ids].float()
    teacher_rows = teacher.get_input_embeddings().weight[teacher_ids].float()
    matrix = closest_map(student_rows, normalised(teacher_rows))
    return projector(torch.block_diag(matrix, matrix))
