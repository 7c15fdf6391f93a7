"""Optimisers by name: torch's own, and those of bitsandbytes that keep their moments in 8 bits or
in paged memory.

- ``adamw``: Loshchilov and Hutter, arXiv:1711.05101. ``sgd``: with the first of ``betas`` as
  Nesterov's momentum.
- ``adamw8bit``: both moments in 8 bits, 256 numbers sharing a scale (Dettmers et al.,
  arXiv:2110.02861): 2 bytes per parameter instead of 8. Tensors below 4096 numbers keep 32 bits.
- ``paged_adamw``, ``paged_adamw8bit``: moments in memory that CUDA moves to the host while it is
  short (QLoRA, arXiv:2305.14314, section 3). These need a GPU; the 8-bit one without pages runs on
  a CPU too.

Names are checked without torch; :func:`build` imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from slim.core.errors import SlimError

if TYPE_CHECKING:
    from torch.optim import Optimizer

# name -> module, class, bytes of state per parameter
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", 8),
    "sgd": ("torch.optim", "SGD", 4),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", 2),
    "paged_adamw": ("bitsandbytes.optim", "PagedAdamW32bit", 8),
    "paged_adamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit", 2),
}


def require_optimizer(name: str, setting: str) -> None:
    """Check that the package of an optimiser is installed.

    Args:
        name: A key of ``OPTIMIZERS``.
        setting: The setting that names it, as the user types it.

    Raises:
        SlimError: It is not.
    """
    package = OPTIMIZERS[name][0].split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise SlimError(
            f"{setting}={name} needs the package {package}. "
            f"Install it: pip install {package}, or use adamw."
        )


def require_device(name: str, setting: str, device: str) -> None:
    """Check that an optimiser works on a device.

    Args:
        name: A key of ``OPTIMIZERS``.
        setting: The setting that names it, as the user types it.
        device: Torch's name of the device.

    Raises:
        SlimError: It is a paged one, and there is no GPU.
    """
    if name.startswith("paged") and not device.startswith("cuda"):
        raise SlimError(
            f"{setting}={name} pages between GPU and host memory, and the training is on "
            f"{device}. "
            f"Use {setting}={name.removeprefix('paged_')}, or a GPU (device=cuda)."
        )


def build(
    name: str, groups: list[dict], learning_rate: float, betas: tuple[float, float]
) -> Optimizer:
    """Return an optimiser.

    Args:
        name: A key of ``OPTIMIZERS``.
        groups: Parameter groups, each with ``params`` and ``weight_decay``.
        learning_rate: The highest.
        betas: Decay of the two moments.
    """
    module, kind, _ = OPTIMIZERS[name]
    if module.startswith("bitsandbytes"):
        import logging

        # It complains about kernels that are not needed here.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    make = getattr(importlib.import_module(module), kind)
    if name == "sgd":
        return make(groups, lr=learning_rate, momentum=betas[0], nesterov=betas[0] > 0)
    if name == "adamw":
        return make(groups, lr=learning_rate, betas=betas, fused=True)
    return make(groups, lr=learning_rate, betas=betas)
