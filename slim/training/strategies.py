"""How several processes share a training: Lightning's strategies, by the names of the trainer's
settings.

``ddp``: every process has the whole model, gradients are averaged. ``fsdp``: parameters, gradients
and the optimiser's state are split over the processes, block by block (Zhao et al.,
arXiv:2304.11277). ``deepspeed_zero2`` splits gradients and optimiser, ``deepspeed_zero3`` the
parameters too, a teacher's included, and ``_offload`` keeps them in the host's memory (Rajbhandari
et al., arXiv:1910.02054; Ren et al., arXiv:2101.06840).
"""

from __future__ import annotations

import os
from typing import Any

from slim.core import processes
from slim.training.trainer_settings import DEEPSPEED

AUTOCAST = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}


def trainer_arguments(
    strategy: str, device: str, precision: str, clip: float = 0.0
) -> dict[str, Any]:
    """Return the arguments of ``pl.Trainer`` that say where and how to compute.

    Args:
        strategy: As ``TrainerSettings.resolved_strategy`` gives it.
        device: Torch's name of the device.
        precision: Lightning's name of the precision.
        clip: Largest norm of the gradient; 0 for no limit.
    """
    on_gpu = device.startswith("cuda")
    arguments = precision_arguments(precision, on_gpu)
    arguments["accelerator"] = "gpu" if on_gpu else "cpu"
    if strategy == "auto":
        return {**arguments, "devices": 1}
    arguments["devices"] = processes.local_world_size()
    arguments["num_nodes"] = processes.world_size() // processes.local_world_size()
    arguments["strategy"] = build(strategy, on_gpu)
    if strategy in DEEPSPEED:  # it alone has the whole gradient
        arguments["gradient_clip_val"] = clip or None
    return arguments


def precision_arguments(precision: str, on_gpu: bool) -> dict[str, Any]:
    """Return the arguments of ``pl.Trainer`` that set the precision.

    Args:
        precision: Lightning's name.
        on_gpu: Whether the training is on a GPU.
    """
    # Given its name, Lightning would replace float16 on a CPU.
    if precision == "16-mixed" and not on_gpu:
        from lightning.pytorch.plugins import MixedPrecision

        return {"plugins": [MixedPrecision(precision, "cpu")]}
    return {"precision": precision}


def build(strategy: str, on_gpu: bool):
    """Return Lightning's strategy.

    Args:
        strategy: ``ddp``, ``fsdp`` or one of ``DEEPSPEED``.
        on_gpu: Whether the training is on GPUs.
    """
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if strategy == "ddp":
        return DDPStrategy(process_group_backend="nccl" if on_gpu else "gloo")
    if strategy == "fsdp":
        # "auto" would mean tensor parallelism, for which the model's layers are not prepared.
        return ModelParallelStrategy(
            data_parallel_size=processes.world_size(), tensor_parallel_size=1
        )
    return deepspeed_strategy(strategy, on_gpu)


def deepspeed_strategy(name: str, on_gpu: bool):
    """Return Lightning's DeepSpeed strategy; on a CPU one that runs under gloo, for trying things
    out.

    Args:
        name: One of ``DEEPSPEED``.
        on_gpu: Whether the training is on GPUs.
    """
    prepare_deepspeed(on_gpu)
    from lightning.pytorch.strategies import DeepSpeedStrategy

    zero = {
        "stage": 3 if "zero3" in name else 2,
        "contiguous_gradients": on_gpu,
        "overlap_comm": on_gpu,
    }
    if name.endswith("_offload"):
        host = {"device": "cpu", "pin_memory": on_gpu}
        zero |= {"offload_optimizer": dict(host), "offload_param": dict(host)}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for its own statistics only
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own is used, and needs no compiler
        "zero_optimization": zero,
    }
    return (DeepSpeedStrategy if on_gpu else cpu_strategy())(config=config)


def prepare_deepspeed(on_gpu: bool) -> None:
    """Set what DeepSpeed reads when it is imported.

    Args:
        on_gpu: Whether the training is on GPUs.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import deepspeed

    if not on_gpu:  # the first start would compile a helper for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cpu_strategy() -> type:
    """Return Lightning's DeepSpeed strategy without its refusal of anything but CUDA."""
    import torch
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class CpuDeepSpeedStrategy(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._process_group_backend = "gloo"
            self._init_deepspeed_distributed()

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

        def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
            import deepspeed

            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            engine, optimizer, _, _ = deepspeed.initialize(
                config=self.config,
                model=model,
                model_parameters=trained,
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
            return engine, optimizer

    return CpuDeepSpeedStrategy
