"""From the command line to the pipeline: ``quant`` for ``quantizer``, short errors, exit codes.

Exit codes: 0 done, 1 an error inside slim (with its traceback), 2 a mistake in the command or a
limit of the machine, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from slim.chain.compose import CONF, expand_alias
from slim.chain.explain import check_form, explain
from slim.cli.experiments import check_experiments
from slim.cli.help import help_page, is_asked_for
from slim.cli.signals import end_in_order, exit_code
from slim.core.console import fail, never_fail_on_a_character, output_may_be_cut
from slim.core.errors import Terminated


def launch(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run a task with the configuration of this process' command line and end the process with the
    exit code.

    Args:
        config_name: the command: ``compress``, ``train`` or ``evaluate``.
        task: what to do with the composed configuration.
    """
    never_fail_on_a_character()
    end_in_order()
    import hydra  # local: importing takes a while, and a signal may come meanwhile

    # before anyone reads them: Hydra knows only the group's real name, and -m only in front
    sys.argv[1:] = sweep_flag_first(expand_alias(sys.argv[1:]))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves its errors to us

    arguments = sys.argv[1:]

    def job(config: DictConfig) -> Any:
        if is_sweep():
            # a point records by itself how it ended, also in another process
            from slim.sweeps.point import run_point

            return run_point(task, config, lambda error: explain(error, config_name, arguments))
        try:
            return task(config)
        except Exception as error:  # Hydra would print a line of its own first
            message = explain(error, config_name, arguments)
            if message is None:
                raise
            fail(message, 2)

    hide_bases()
    # our checks come before Hydra's, whose errors say less
    try:
        check_experiments(arguments, CONF, config_name)
        if is_asked_for(arguments):
            with output_may_be_cut():
                print(help_page(config_name, arguments), end="")
            sys.exit(0)
        check_form(arguments)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except KeyboardInterrupt as error:
        close_sweep(error)
        word = "Terminated" if isinstance(error, Terminated) else "Interrupted"
        fail(f"{word}. Finished stages are kept; the same command resumes there.", exit_code(error))
    except Exception as error:
        close_sweep(error)
        message = explain(error, config_name, arguments)
        if message is None:
            raise
        fail(message, 2)
    sys.exit(close_sweep())


def sweep_flag_first(arguments: list[str]) -> list[str]:
    """Return the arguments with ``-m`` in front: Hydra refuses it between two settings, and it
    may be typed anywhere."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return [*flags, *(argument for argument in arguments if argument not in flags)]


def hide_bases() -> None:
    """Leave out the choice files that others build on (``_base.yaml``) wherever Hydra lists
    choices: in ``--help``, in errors, in completion and for ``*``."""
    from hydra._internal.config_repository import ConfigRepository

    list_all = ConfigRepository.get_group_options

    def list_choices(self, *arguments: Any, **settings: Any) -> list[str]:
        return [name for name in list_all(self, *arguments, **settings) if name[:1] != "_"]

    ConfigRepository.get_group_options = list_choices


def close_sweep(error: BaseException | None = None) -> int:
    """End the sweep that this process was started for, if any; return the exit code for its
    points."""
    sweep = sys.modules.get("slim.sweeps.sweep")  # not imported where there is no sweep
    if sweep is None:
        return 0
    return sweep.close_current(error)


def is_sweep() -> bool:
    """Whether this process runs a point of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
