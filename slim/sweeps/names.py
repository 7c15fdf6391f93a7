"""Names by which a sweep and its points are found again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from slim.checkpoints.stage import Stage
from slim.checkpoints.store import digest

if TYPE_CHECKING:
    from slim.checkpoints.result import Step

# where and how, not what: the same sweep with another of these continues the first
PLACE = re.compile(r"^(tracking\.(run_name|uri|published)|store|ignore_limits|plan)=")


def typed(hydra: DictConfig) -> list[str]:
    """Return what was typed (or set for a point), as it was: ``${...}`` in it is not for us to
    resolve."""
    return list(OmegaConf.to_container(hydra.overrides.task, resolve=False))


def sweep_id(command: str, experiment: str, overrides: Sequence[str], params: dict) -> str:
    """Name a sweep by its command (``compress``), MLflow experiment and what is set and swept, in
    whatever order.

    Args:
        command: ``compress``, ``train`` or ``evaluate``.
        experiment: name of the MLflow experiment.
        overrides: what was typed, without Hydra's own settings.
        params: ``hydra.sweeper.params`` of an experiment file.
    """
    what = [override for override in overrides if not PLACE.match(override)]
    return digest(["sweep", command, experiment, sorted(what), params])


def point_name(chains: Sequence[Sequence[Step]], config: DictConfig) -> str:
    """Name a point by what determines its results: every step, how it is measured, and on which
    kind of device.

    Args:
        chains: the planned steps of every pipeline of the point. A step after a source that has to
            be fetched first has no digest yet; there its settings count.
        config: the point's configuration.
    """
    steps = [list(map(_identity, chain)) for chain in chains]
    # figures of speed hold on one kind of device, so the same point on a GPU is another one
    return digest(
        ["point", steps, OmegaConf.to_container(config.eval, resolve=True), config.device]
    )


def _identity(step: Step) -> str | list:
    """Return a step's digest; what its digest would be made of, where it has none yet."""
    if step.digest:
        return step.digest
    if isinstance(step.stage, Stage):
        return [step.stage.kind, step.stage.cache_key(), step.stage.version]
    return [step.stage.source, step.stage.revision]
