"""Hydra's call at the start of a sweep, under every sweeper and launcher. Imported by ``--help``:
keep it light."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from omegaconf import DictConfig


class SweepCallback:
    """Opens the sweep in MLflow before its first point.

    ``slim.cli.launch.launch`` closes it, since Hydra does not after an error.
    """

    def on_multirun_start(self, config: DictConfig, config_name: str, **kwargs: Any) -> None:
        """Prepare the sweep. slim's own sweepers open it, when they know that there is a point to
        run.

        Args:
            config: the configuration without what is swept.
            config_name: the command: ``compress``, ``train`` or ``evaluate``.
            kwargs: whatever else Hydra passes, in this version and later ones.
        """
        from slim.core.console import fail
        from slim.core.errors import SlimError
        from slim.sweeps import sweep

        try:
            started = sweep.prepare(config, config_name)
            if not started.own:
                started.open()
        except SlimError as error:  # Hydra would turn it into a warning, and go on
            fail(str(error), 2)
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    def __getattr__(self, name: str):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None  # the other events are none of ours
