"""Energy and CO2 through codecarbon, told apart by whether the machine was read or only estimated.

codecarbon reads a processor's counter (RAPL) and a GPU's (NVML) where it may, and else multiplies
the processor's nominal power with its load; memory is always estimated by its size. Grams of CO2
are the energy times the mean intensity of the country's electricity. Nothing is sent anywhere: the
offline tracker is used.
Source: https://mlco2.github.io/codecarbon/ (package ``codecarbon``, an optional extra of slim).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slim.core.errors import SlimError, did_you_mean
from slim.evaluation.timing import timed_run

RAPL = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
# countries that codecarbon knows, inside its package
MIX = Path("data") / "private_infra" / "global_energy_mix.json"
# run generation for so long at least: below, a meter that ticks every few milliseconds says little
LEAST_SECONDS = 2.0


def check_country(country: str) -> None:
    """Raise ``SlimError`` if codecarbon is not there or does not know the country.

    Args:
        country: ISO code of three letters.
    """
    package = importlib.util.find_spec("codecarbon")
    if package is None:
        raise SlimError(
            "eval.energy needs codecarbon: pip install 'slim[energy]'. Without it: eval.energy=null"
        )
    known = _known_countries(package)
    # without the list codecarbon itself says what it does not know, though later
    if known and country not in known:
        raise SlimError(
            f"eval.energy={country} is no country that codecarbon knows. It takes an ISO code of "
            "three letters, such as DEU, "
            f"FRA or USA.{did_you_mean(str(country), known)}"
        )


def _known_countries(package: importlib.machinery.ModuleSpec) -> list[str]:
    """Return the codes in codecarbon's own list, in order; none where it is not where it was."""
    folders = package.submodule_search_locations
    if not folders:
        return []
    mix = Path(folders[0]) / MIX
    if not mix.is_file():
        return []
    return sorted(json.loads(mix.read_text(encoding="utf-8")))


def meters(device: str) -> list[str]:
    """Return the meters of this machine that can be read for ``device``: ``"RAPL"``, ``"NVML"``,
    both or none."""
    readable = []
    counters = RAPL.glob("intel-rapl*/energy_uj")
    # since 2020 only root may read them, unless the machine's owner allowed it
    if any(os.access(path, os.R_OK) for path in counters):
        readable.append("RAPL")
    if device.startswith("cuda") and _nvml():
        readable.append("NVML")
    return readable


def _nvml() -> bool:
    """Whether the driver tells the power of the first GPU."""
    if importlib.util.find_spec("pynvml") is None:
        return False
    import pynvml

    try:
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return False
    return True


class EnergyMeter:
    """Measures the body of a ``with`` on the whole machine::

        with EnergyMeter("DEU", device) as meter:
            ...
        meter.metrics  # energy_joules, co2_grams, energy_estimated (1.0 or 0.0)

    Attributes:
        country: ISO code of three letters, for the CO2 of a kilowatt-hour.
        device: ``"cpu"`` or a GPU, such as ``"cuda"``.
        metrics: ``energy_joules``, ``co2_grams`` and ``energy_estimated``: 1.0 where the device's
            own meter could not be read, so that its share is a guess from nominal power. Empty
            until the end, and where codecarbon failed.
    """

    def __init__(self, country: str, device: str):
        self.country = country
        self.device = device
        self.metrics: dict[str, float] = {}

    @property
    def estimated(self) -> bool:
        """Whether the energy of the device is a guess."""
        meter = "NVML" if self.device.startswith("cuda") else "RAPL"
        return meter not in meters(self.device)

    def __enter__(self) -> EnergyMeter:
        from codecarbon import OfflineEmissionsTracker

        # log_level holds only after its first lines
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=self.country,
            measure_power_secs=1,
            save_to_file=False,
            log_level="critical",
            allow_multiple_runs=True,
        )
        self._tracker.start()
        return self

    def __exit__(self, *_) -> None:
        self._tracker.stop()
        emissions = getattr(self._tracker, "final_emissions_data", None)
        if emissions is None:  # codecarbon swallows its own errors
            return
        self.metrics = {
            "energy_joules": float(emissions.energy_consumed) * JOULES_PER_KWH,
            "co2_grams": float(emissions.emissions) * 1000,  # told in kilograms
            "energy_estimated": float(self.estimated),
        }


@contextmanager
def stage_energy(country: str | None, device: str, metadata: dict) -> Iterator[None]:
    """Measure the body of a ``with``.

    Args:
        country: ISO code of three letters; None measures nothing.
        device: ``"cpu"`` or a GPU.
        metadata: what the energy is added to, under the names of :class:`EnergyMeter`.
    """
    if country is None:
        yield
        return
    meter = EnergyMeter(country, device)
    with meter:
        yield
    metadata.update(meter.metrics)


def generation_energy(
    model, prompts: list[list[int]], new_tokens: int, country: str
) -> dict[str, float]:
    """Measure the energy of generating, prefill included.

    Args:
        model: a torch module of transformers.
        prompts: tokens of each prompt, run one at a time, and all again until ``LEAST_SECONDS``
            have passed.
        new_tokens: tokens generated after each.
        country: ISO code of three letters.

    Returns:
        ``energy_joules_per_token`` and ``co2_micrograms_per_token``, per generated token. The names
        of guesses end in ``_estimate``, so that no table or plot mixes them with what was read from
        a meter. Empty where codecarbon failed.
    """
    import torch

    # before the meter runs: copying to the device is not generating
    tensors = [torch.tensor([ids], device=model.device) for ids in prompts]
    tokens = 0
    meter = EnergyMeter(country, model.device.type)
    with torch.inference_mode(), meter:
        until = time.monotonic() + LEAST_SECONDS
        while tokens == 0 or time.monotonic() < until:
            for prompt in tensors:
                timed_run(model, prompt, new_tokens)
                tokens += new_tokens
    if not meter.metrics:
        return {}
    end = ""
    if meter.metrics["energy_estimated"]:
        end = "_estimate"
    return {
        f"energy_joules_per_token{end}": meter.metrics["energy_joules"] / tokens,
        f"co2_micrograms_per_token{end}": meter.metrics["co2_grams"] * 1e6 / tokens,
    }
