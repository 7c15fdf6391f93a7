"""The search space: what is fixed, what may vary, and points that were not tried yet.

The syntax is that of the Optuna sweeper, which also reads it: ``choice(2,3,4)``, ``range(1,5)``,
``interval(0.1,0.5)``, and ``2,3,4`` on the command line."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule

distributions = LazyModule("optuna.distributions")
LISTED = 20_000  # points of a space that are listed in order to find one that was not tried


@dataclass
class Space:
    """What varies and what is fixed. A point is a dict key -> value.

    Attributes:
        varying: key -> Optuna distribution.
        fixed: key -> override as typed.
        tried: the points that were tried, as :func:`key_of` returns them.
    """

    varying: dict[str, Any]
    fixed: dict[str, str] = field(default_factory=dict)
    tried: set[tuple] = field(default_factory=set)

    @classmethod
    def read(cls, params: dict[str, Any], typed: list[str], fixed: dict[str, str]) -> Space:
        """Read a search space. What was typed wins over the search's file.

        Args:
            params: the configuration's ``hydra.sweeper.params``.
            typed: overrides as typed.
            fixed: key -> override, of those typed ones that have one value.

        Raises:
            SlimError: when Optuna's sweeper cannot read it.
        """
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

        # in this order: of two overrides of one key the last counts
        swept = [f"{key}={value}" for key, value in params.items()]
        for override in typed:
            if override not in fixed.values():
                swept.append(override)
        try:
            varying, _ = create_params_from_overrides(swept)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise SlimError(f"The search space cannot be read: {error}") from error
        for key in fixed:
            varying.pop(key, None)
        return cls(varying, fixed)

    def overrides(self, point: dict[str, Any]) -> list[str]:
        """Return a point with all that is fixed as Hydra overrides."""
        return [*self.fixed.values(), *settings(point)]

    @property
    def size(self) -> float:
        """Number of points; infinite where a setting is continuous."""
        return math.prod(map(count, self.varying.values()))

    @property
    def exhausted(self) -> bool:
        """Whether every point was tried."""
        return len(self.tried) >= self.size

    def is_new(self, point: dict[str, Any]) -> bool:
        """Whether a point was not tried yet."""
        return key_of(point) not in self.tried

    def add(self, point: dict[str, Any]) -> None:
        """Take a point as tried."""
        self.tried.add(key_of(point))

    def nearest_new(self, point: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        """Return a point not tried yet that differs from ``point`` in as few settings as can be,
        chosen by ``generator``.

        In a space too large to be listed, random points until one is new. There must be one.

        Args:
            point: that was tried.
            generator: of random numbers.
        """
        if self.size > LISTED:
            return self._random_new(generator)
        nearest: list[dict[str, Any]] = []
        least = len(point) + 1  # more than any two points differ in
        for values in itertools.product(*map(members, self.varying.values())):
            candidate = dict(zip(self.varying, values, strict=True))
            if not self.is_new(candidate):
                continue
            distance = differing(candidate, point)
            if distance < least:  # those so far are further away
                nearest = []
                least = distance
            if distance == least:
                nearest.append(candidate)
        return generator.choice(nearest)

    def _random_new(self, generator: random.Random) -> dict[str, Any]:
        """Draw points until one is new: nearly all of a large space are."""
        while True:
            point = {}
            for key, values in self.varying.items():
                point[key] = draw(values, generator)
            if self.is_new(point):
                return point


def differing(candidate: dict[str, Any], point: dict[str, Any]) -> int:
    """Return in how many settings two points differ.

    Args:
        candidate: has every setting of ``point``.
        point: the one to compare with.
    """
    number = 0
    for key, value in point.items():
        number += candidate[key] != value
    return number


def fixed_overrides(typed: list[str]) -> dict[str, str]:
    """Return key -> override as typed, of those with one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    fixed = {}
    for override in OverridesParser.create().parse_overrides(typed):
        if not override.is_sweep_override():
            fixed[override.get_key_element()] = override.input_line
    return fixed


def key_of(point: dict[str, Any]) -> tuple:
    """Return a point so that it can be in a set."""
    # repr: values of different types cannot be sorted, and 1 and True are different settings
    return tuple(sorted((key, repr(value)) for key, value in point.items()))


def settings(point: dict[str, Any]) -> list[str]:
    """Return the settings of a point as Hydra overrides."""
    return [f"{key}={as_typed(value)}" for key, value in point.items()]


def as_typed(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def count(values) -> float:
    """Return how many values a distribution has, infinity for a continuous one."""
    if isinstance(values, distributions.CategoricalDistribution):
        return len(values.choices)
    if isinstance(values, distributions.IntLogUniformDistribution):
        return values.high - values.low + 1
    if isinstance(values, distributions.IntUniformDistribution):
        return (values.high - values.low) // values.step + 1
    if isinstance(values, distributions.DiscreteUniformDistribution):
        # a hair more: 0.3 / 0.1 is just below 3, and the end belongs to the range
        return math.floor((values.high - values.low) / values.q + 1e-9) + 1
    return math.inf


def shown(values) -> list[str]:
    """Return the values of a distribution as typed; of a continuous or a large one its ends."""
    if count(values) > LISTED:  # a list would fill the screen and the sweep's file
        return [as_typed(values.low), as_typed(values.high)]
    return list(map(as_typed, members(values)))


def example(values) -> Any:
    """Return one value of a distribution."""
    if isinstance(values, distributions.CategoricalDistribution):
        return values.choices[0]
    return values.low


def members(values) -> list:
    """Return the values of a distribution that is not continuous."""
    if isinstance(values, distributions.CategoricalDistribution):
        return list(values.choices)
    if isinstance(values, distributions.DiscreteUniformDistribution):
        return [values.low + number * values.q for number in range(int(count(values)))]
    return list(range(values.low, values.high + 1, getattr(values, "step", 1)))


def draw(values, generator: random.Random) -> Any:
    """Return a random value of a distribution, a continuous one uniformly between its ends.

    Args:
        values: the distribution.
        generator: of random numbers.
    """
    if count(values) < LISTED:
        return generator.choice(members(values))
    number = generator.uniform(values.low, values.high)
    if isinstance(values.low, int):
        return int(number)
    return number
