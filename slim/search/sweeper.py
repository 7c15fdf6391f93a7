"""Which points a search tries: Optuna proposes, what cannot be or was tried is left out, the rest
is run.

Optuna (TPE, arXiv:1907.10902) knows the points it was told of, not the space: with few values per
setting it proposes the same point again and again, which would cost a trial each. So a proposal
that was tried is moved to the nearest point that was not. The search ends after ``n_trials`` points
that were run, or when all were tried; a point that its plan rules out is no trial. The sampler has
a seed and what is measured is kept, so the same command makes the same trials again, from the
store."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from slim.core.console import say
from slim.core.errors import SlimError
from slim.core.settings import require_number
from slim.quantization.storage import weight_bytes
from slim.search.budget import OverBudget
from slim.search.outcome import Trial, conclude, show
from slim.search.point import planned_model
from slim.search.settings import Search, read_search
from slim.search.space import Space, example, fixed_overrides, members, settings, shown
from slim.sweeps.grid import Planned, finalize, plan_point, record_lost
from slim.sweeps.point import Point, record_failure
from slim.sweeps.protocols import HydraSweeper
from slim.sweeps.sweep import Sweep, current

RULED_OUT = 20  # points per trial that may be ruled out before a search ends


def run_search(sweeper: HydraSweeper, typed: list[str]) -> dict:
    """Try points until there are enough, print and write what came of them.

    Args:
        sweeper: as Hydra has set it up.
        typed: what was typed.

    Returns:
        See :func:`slim.search.outcome.conclude`.

    Raises:
        SlimError: when a setting cannot be, nothing varies, or no point is any good.
    """
    fixed = fixed_overrides(typed)
    search = check_settings(sweeper, fixed)
    quiet_optuna()
    params = OmegaConf.to_container(sweeper.config.hydra.sweeper.params, resolve=True)
    space = Space.read(params, typed, fixed)
    drop_unknown(sweeper, space, set(params))
    if not space.varying:
        raise SlimError(
            "There is nothing to search: nothing is left that varies. Fix fewer settings, "
            "or let others vary, such as -m quant.bits=2,3,4."
        )
    run = Run(sweeper, space, search)
    run.announce()
    while run.goes_on:
        run.advance()
    # also where every point failed: then it says so as an error
    outcome = conclude(run.trials, search, Path(sweeper.config.hydra.sweep.dir))
    show(outcome)
    return outcome


class Run:
    """A search under way.

    Args:
        sweeper: as Hydra has set it up.
        space: what varies.
        search: what is looked for.

    Attributes:
        wanted: trials still to be made.
        trials: what was tried, in order, also what was ruled out.
    """

    def __init__(self, sweeper: HydraSweeper, space: Space, search: Search):
        import optuna
        from hydra.utils import instantiate

        self.sweeper = sweeper
        self.space = space
        self.search = search
        self.sweep = current()
        self.at_once = int(sweeper.settings["n_jobs"])
        self.wanted = int(sweeper.settings["n_trials"])
        self.most = RULED_OUT * self.wanted
        self.study = optuna.create_study(
            sampler=instantiate(sweeper.settings["sampler"]), directions=search.directions
        )
        self.failed = optuna.trial.TrialState.FAIL
        # seeded: the same command moves the same proposals to the same points
        self.generator = random.Random(int(sweeper.config.get("seed") or 0))
        self.trials: list[Trial] = []

    @property
    def goes_on(self) -> bool:
        return self.wanted > 0 and not self.space.exhausted and len(self.trials) < self.most

    def announce(self) -> None:
        """Open the sweep, now that nothing is wrong with what was typed, and tell it what
        varies."""
        swept = {}
        for key, values in self.space.varying.items():
            swept[key] = shown(values)
        self.sweep.swept = swept
        self.sweep.total = int(min(self.wanted, self.space.size))
        if self.sweep.tracker is None:
            self.sweep.open()
        self.sweep.folder.write_header(self.sweep.header())

    def advance(self) -> None:
        """Try the next points, as many as run at once."""
        batch: list[Trial] = []
        # Optuna proposes the points of a batch without knowing how the others end
        while self.goes_on and len(batch) < min(self.at_once, self.wanted):
            trial = self.ask()
            if self.settled(trial):
                self.tell(trial)  # at once, so that the next proposal knows it
            else:
                batch.append(trial)
        self.launch(batch)

    def ask(self) -> Trial:
        """Return a point that was not tried: Optuna's proposal, or the nearest there is."""
        asked = self.study.ask(self.space.varying)
        if not self.space.is_new(asked.params):
            # Optuna takes back no proposal: this one counts as failed, and the point that is run
            # in its stead is queued, so that the next ask returns it
            point = self.space.nearest_new(asked.params, self.generator)
            self.study.tell(asked, state=self.failed)
            self.study.enqueue_trial(point)
            asked = self.study.ask(self.space.varying)
        self.space.add(asked.params)
        self.trials.append(Trial(len(self.trials), dict(asked.params), asked))
        return self.trials[-1]

    def settled(self, trial: Trial) -> bool:
        """Plan a point; return whether that is all: it cannot be run, is ruled out, or was run
        before."""
        planned = plan_point(
            self.sweeper, self.sweep, trial.number, self.space.overrides(trial.point)
        )
        try:
            if planned.error is None:
                trial.model = planned_model(planned.config)
                trial.needed = self.search.budget.memory(weight_bytes(trial.model), trial.model)
                self.search.budget.check_plan(trial.model)
        except OverBudget as error:
            trial.skipped = True
            trial.error = str(error)
            record_skipped(self.sweep, planned, str(error))
            return True
        trial.planned = planned
        return finalize(self.sweep, planned)

    def launch(self, batch: list[Trial]) -> None:
        """Run points and tell Optuna what came of them."""
        if not batch:
            return
        numbered = []
        for trial in batch:
            numbered.append([*trial.planned.overrides, f"hydra.sweep.subdir={trial.number}"])
        try:
            self.sweeper.launcher.launch(numbered, initial_job_idx=batch[0].number)
        except Exception as error:  # a process that died takes the others of the batch with it
            record_lost(self.sweep, [trial.planned for trial in batch], error)
        for trial in batch:
            self.tell(trial)

    def tell(self, trial: Trial) -> None:
        """Tell Optuna what came of a trial, as the sweep's folder records it.

        One that misses the budget once it is measured has the worst value there is; with several
        objectives it counts as failed, since what is not finite has no place in the volume behind a
        front. One that its plan rules out counts as failed, too, and teaches nothing: it costs
        nothing, and the best points lie next to those that are just too large."""
        if not trial.skipped:
            trial.take(self.sweep.folder, self.search)
            # a point that cannot even be planned took no time: it is no trial of the wanted ones
            self.wanted -= trial.planned.error is None
        if trial.good:
            self.study.tell(trial.asked, list(trial.result["objectives"].values()))
        elif trial.result is not None and len(self.search.objectives) == 1:
            self.study.tell(trial.asked, self.search.worst)
        else:
            self.study.tell(trial.asked, state=self.failed)
        self.sweep.total = int(min(len(self.trials) + self.wanted, self.space.size))


def record_skipped(sweep: Sweep, planned: Planned, message: str) -> None:
    """Record a point that its plan rules out: a failed run that was never begun.

    Args:
        sweep: that it belongs to.
        planned: the point.
        message: why it is ruled out.
    """
    point = Point(sweep.folder, planned.number, planned.overrides, sweep.header())
    record_failure(point, planned.config, message, skipped=True)
    point.end("FAILED", message, skipped=True)


def compose(sweeper: HydraSweeper, overrides: list[str]) -> DictConfig:
    """Return the configuration of a point as its launcher will compose it.

    Args:
        sweeper: as Hydra has set it up.
        overrides: the point's settings as typed.
    """
    return sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, overrides)


def check_settings(sweeper: HydraSweeper, fixed: dict[str, str]) -> Search:
    """Return the search's settings.

    Args:
        sweeper: as Hydra has set it up.
        fixed: setting -> override as typed, of those that do not vary.

    Raises:
        SlimError: for a mistake in them; before the first point.
    """
    from hydra.utils import instantiate

    for name in ("n_trials", "n_jobs"):
        require_number(f"hydra.sweeper.{name}", sweeper.settings[name], 1, integer=True)
    # composed without what varies: that cannot change what the search is
    config = compose(sweeper, list(fixed.values()))
    if config.plan:
        raise SlimError(
            "plan=true shows a run or a grid, and a search chooses each point by the ones "
            "before it.\nTo see one point's plan, leave hparams_search= out."
        )
    search = read_search(config)
    if search is None:
        raise SlimError(
            "A search has objectives: choose hparams_search=pareto or hparams_search=budget."
        )
    evaluation = None
    if config.eval and config.eval.get("_target_"):
        evaluation = instantiate(config.eval)
    search.check(evaluation)
    return search


def drop_unknown(sweeper: HydraSweeper, space: Space, own: set[str]) -> None:
    """Leave out settings of the search's file that what was typed does not have, such as those of
    pruner=none.

    Args:
        sweeper: as Hydra has set it up.
        space: what varies; it is changed.
        own: the settings that the search's file lets vary.
    """
    for key in list(space.varying):  # a copy: keys are removed on the way
        if key in own and not _is_setting(sweeper, space, key):
            del space.varying[key]
            say(f"{key} is not searched: what was chosen has no such setting.")


def _is_setting(sweeper: HydraSweeper, space: Space, key: str) -> bool:
    """Whether a configuration of the space composes with a value of the setting ``key``."""
    value = settings({key: example(space.varying[key])})
    fixed = list(space.fixed.values())
    group = key.partition(".")[0]
    if group == key or group not in space.varying:
        return _composes(sweeper, fixed + value)
    # the group varies too (quantizer=rtn,none): one choice with the setting is enough
    for choice in members(space.varying[group]):
        if _composes(sweeper, fixed + settings({group: choice}) + value):
            return True
    return False


def _composes(sweeper: HydraSweeper, overrides: list[str]) -> bool:
    try:
        compose(sweeper, overrides)
    except Exception:  # Hydra has a dozen kinds of error for what does not fit together
        return False
    return True


def quiet_optuna() -> None:
    """Keep Optuna's log and its notes on what is experimental out of our output. Raises
    ``SlimError`` where it is missing."""
    try:
        import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
        import optuna
    except ImportError as error:
        raise SlimError("A search needs the Optuna sweeper: pip install 'slim[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
