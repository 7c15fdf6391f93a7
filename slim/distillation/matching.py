"""Hidden states and attention maps of the student's blocks against those of the teacher's they
stand for.

    hidden:     sum over tokens of ||P h_s - h_t||^2 / ||h_t||^2, mean over blocks
                (after Sun et al., arXiv:1908.09355, and Jiao et al., TinyBERT, arXiv:1909.10351)
    attention:  sum over tokens of KL(A_t || A_s), mean over heads and blocks
                (after Sun et al., MobileBERT, arXiv:2004.02984)

P is the identity where both models are equally wide, else a learned matrix that begins where the
student's embeddings come closest to the teacher's. Where the numbers of heads differ the maps are
averaged over the heads first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim.data.packing import IGNORE
from slim.distillation.layer_map import Matching, hidden_targets, nearest_blocks
from slim.distillation.student import evenly_spaced


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ||s - t||^2 / ||t||^2 per token, float32 [tokens].

    Args:
        student: s, [tokens, hidden size].
        teacher: t, [tokens, hidden size].
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(A_t || A_s) per query, mean over heads, float32 [tokens].

    Args:
        student: A_s, [heads, tokens, keys].
        teacher: A_t, [heads, tokens, keys]; the number of heads may differ.
    """
    if len(student) != len(teacher):
        student, teacher = student.mean(0, keepdim=True), teacher.mean(0, keepdim=True)
    student, teacher = student.float().clamp_min(1e-9), teacher.float()
    return (torch.xlogy(teacher, teacher) - teacher * student.log()).sum(-1).mean(0)


@torch.no_grad()
def projector(student: nn.Module, teacher: nn.Module) -> nn.Linear | None:
    """Return the map between hidden states of different widths, or None where they are the same.

    It begins as the matrix that turns the student's embeddings into the teacher's with the smallest
    squared error.

    Args:
        student: The student's model.
        teacher: The teacher's model.
    """
    ours = student.get_input_embeddings().weight.float()
    theirs = teacher.get_input_embeddings().weight.float()
    if ours.shape[1] == theirs.shape[1]:
        return None
    shared = min(len(ours), len(theirs))
    linear = nn.Linear(ours.shape[1], theirs.shape[1], bias=False, device=ours.device)
    linear.weight.copy_(torch.linalg.lstsq(ours[:shared].cpu(), theirs[:shared].cpu()).solution.T)
    return linear


@torch.no_grad()
def nearest_map(student: nn.ModuleList, teacher: nn.ModuleList) -> list[int]:
    """Return the teacher's block that each block of the student was made from, by the distance of
    their weights.

    Parameters of one shape are compared: all of a pruned or healed student's, the norms of a
    quantised teacher's. Evenly spaced blocks where there are none, or none that differ.

    Args:
        student: The student's blocks.
        teacher: The teacher's blocks, at least as many.
    """
    distances: list[list[float]] = []
    for block in student:
        distances.append([distance(block, teacher_block) for teacher_block in teacher])
    if not any(any(row) for row in distances):
        return evenly_spaced(len(teacher), len(student))
    return nearest_blocks(distances)


def distance(student: nn.Module, teacher: nn.Module) -> float:
    """Return the relative distance of two blocks, summed over the parameters that can be
    compared.

    Args:
        student: A block of the student.
        teacher: A block of the teacher.
    """
    theirs = dict(teacher.named_parameters())
    total = 0.0
    for name, value in student.named_parameters():
        match = theirs.get(name.replace(".base_layer", ""))  # the layer inside an adapter
        if match is None or match.shape != value.shape or not match.is_floating_point():
            continue
        expected = match.float()
        error = (value.float() - expected).norm() / expected.norm().clamp_min(1e-12)
        total += error.item()
    return total


class LayerMatching(nn.Module):
    """The weighted losses, summed over the tokens with labels."""

    def __init__(
        self,
        settings: Matching,
        layers: list[int],
        teacher_blocks: int,
        projector: nn.Linear | None,
    ):
        """Put the parts together.

        Args:
            settings: The weights.
            layers: The teacher's block that each of the student's stands for, ascending.
            teacher_blocks: How many there are.
            projector: P; None for the identity.
        """
        super().__init__()
        self.hidden = settings.hidden
        self.attention = settings.attention
        self.layers = layers
        self.targets = hidden_targets(layers, teacher_blocks)
        self.projector = projector

    @property
    def outputs(self) -> dict[str, bool]:
        """What both models have to give."""
        return {
            "output_hidden_states": bool(self.hidden),
            "output_attentions": bool(self.attention),
        }

    def forward(self, student, teacher, labels: Tensor) -> Tensor:
        """Return the losses, summed over the tokens with labels.

        Args:
            student: What the student gave, with hidden states or attention maps.
            teacher: What the teacher gave.
            labels: int64 [rows, length].
        """
        return self.over(student, teacher, labels[:, 1:] != IGNORE)

    def over(self, student, teacher, counts: Tensor) -> Tensor:
        """Return the losses, summed over the tokens that count.

        Args:
            student: What the student gave, with hidden states or attention maps.
            teacher: What the teacher gave.
            counts: bool [rows, length], from the first token on; tokens after the length do not
                count.
        """
        length = counts.shape[1]
        total = torch.zeros((), device=counts.device)
        for block, (same, target) in enumerate(zip(self.layers, self.targets, strict=True)):
            if self.hidden:
                # The first hidden states are the embeddings.
                ours, theirs = student.hidden_states[block + 1], teacher.hidden_states[target + 1]
                error = self.hidden_error(ours[:, :length][counts], theirs[:, :length][counts])
                total = total + self.hidden * error
            if self.attention:
                maps = student.attentions[block], teacher.attentions[same]
                total = total + self.attention * self.maps(*maps, counts)
        return total / len(self.layers)

    def hidden_error(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the relative squared error of hidden states, summed.

        Args:
            student: [tokens, d_s].
            teacher: [tokens, d_t].
        """
        if self.projector is not None:
            student = self.projector(student)
        return relative_error(student, teacher).sum()

    @staticmethod
    def maps(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Return the divergence of attention maps, summed over the queries that count.

        Args:
            student: [rows, heads, length, length].
            teacher: [rows, heads, length, length].
            counts: bool [rows, queries], of the first queries.
        """
        queries = counts.shape[1]
        rows = zip(student[:, :, :queries], teacher[:, :, :queries], counts, strict=True)
        return sum(
            attention_divergence(ours[:, count], theirs[:, count]).sum()
            for ours, theirs, count in rows
        )
