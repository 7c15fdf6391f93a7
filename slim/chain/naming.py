"""Names of chains for people: ``tiny > taylor 2 > lora r8 > awq 4b g64``."""

from __future__ import annotations

from collections.abc import Sequence

from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.core.settings import spoken_name

# Settings that tell stages of one method apart, and how a value is shown.
SHOWN = {
    "ratio": "{}",
    "sparsity": "{}",
    "r": "r{}",
    "bits": "{}b",
    "group_size": "g{}",
}
NAME_LIMIT = 200  # the longest name of a run that reads well


def chain_name(steps: Sequence[Step]) -> str:
    """Name a chain by its source and stages, each with the settings that tell it from others of
    its method.

    Args:
        steps: the planned chain, the source first.
    """
    parts = [steps[0].label]
    for parent, step in zip(steps, steps[1:], strict=False):
        parts.append(stage_name(step, parent))
    return " > ".join(parts)[:NAME_LIMIT]


def stage_name(step: Step, parent: Step) -> str:
    """Name a stage by its method and a few settings: ``taylor 2`` removes two blocks.

    Args:
        step: the planned stage.
        parent: the step before it.
    """
    if not isinstance(step.stage, Stage):
        return step.label
    words = [spoken_name(step.stage)]
    removed = parent.spec.blocks - step.spec.blocks
    if removed:
        words.append(str(removed))
    if getattr(step.stage, "reconstruct", False):
        words.append("reconstructed")
    for setting, form in SHOWN.items():
        value = getattr(step.stage, setting, None)
        if value is not None and value != -1:  # -1: one group per row, the usual meaning of none
            words.append(form.format(value))
    return " ".join(words)
