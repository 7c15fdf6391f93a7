"""From a configuration to a chain."""

from __future__ import annotations

from collections import Counter

from omegaconf import DictConfig, ListConfig, OmegaConf

from slim.chain.pipeline import Pipeline
from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.checkpoints.store import Store, require_folder
from slim.core.errors import SlimError
from slim.core.settings import require_number
from slim.gguf.sources import beginning
from slim.loading.head import lacks_head
from slim.loading.merge import MergeAdapter

# in the order in which they run
SCALES = "slim.training.scales.Scales"
STAGES = ("student_init", "pruner", "tuner", "teacher", "quantizer")


def build_pipeline(config: DictConfig) -> Pipeline:
    """Make the parts that the configuration names.

    Args:
        config: as Hydra composes it.

    Raises:
        SlimError: when a setting cannot be.
    """
    from hydra.utils import instantiate

    from slim.core.hardware import pick_device

    require_folder(config.store)
    require_number("seed", config.seed, 0, 2**32 - 1, integer=True)
    adapter = config.model.get("adapter")
    config = begin_with_head(import_gguf(learn_from_teacher(merge_alias(config))))
    config = begin_tuned(config)
    chosen = []
    for group in STAGES:
        if not config[group]:
            continue
        if "_target_" not in config[group]:
            raise SlimError(
                f"{group}: that file is what choices are made of, not one of them. "
                f"Use {group}=CHOICE; --help lists the choices."
            )
        chosen.append(config[group])
    stages = []
    for settings in chosen:  # "all": dicts and lists as settings, which can be hashed and written
        stages.append(instantiate(settings, _convert_="all"))
    stages.sort(key=lambda stage: getattr(stage, "after_quantizer", False))  # others stay in order
    if adapter is not None:  # every other stage works on the merged weights
        stages.insert(0, MergeAdapter(adapter))
    evaluation = None
    if config.eval and config.eval.get("_target_"):
        evaluation = instantiate(config.eval, _convert_="all")
    return Pipeline(
        model=instantiate(config.model, _convert_="all"),
        stages=[stage for stage in stages if isinstance(stage, Stage)],
        evaluation=evaluation,
        store=Store(config.store),
        device=pick_device(config.device),
        ignore_limits=config.ignore_limits,
    )


def import_gguf(config: DictConfig) -> DictConfig:
    """Where the model is a GGUF file, let the chain begin with its import.

    A teacher that is the model begins with the same import.
    """
    settings = beginning(config.model, config.store)
    if settings is config.model:
        return config
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.model = settings
    return config


def begin_with_head(config: DictConfig) -> DictConfig:
    """Where the task is to tell classes apart, or to score pairs by a cross-encoder, let the chain
    begin with an encoder that has a head for it.

    A head for other classes is replaced; one that knows all of them stays.
    """
    if config.get("task") not in ("classification", "cross_encoder"):
        return config
    trained = config.model.get("_target_") == "slim.training.first.Trained"
    model = config.model.base if trained else config.model
    if model.get("_target_") != "slim.checkpoints.source.Source" or model.get("source") is None:
        return config
    from hydra.utils import instantiate

    base, labels = instantiate(model), ["score"]
    if config.task == "classification":
        labels = instantiate(config.data).classes
    spec = base.describe()
    if spec.is_encoder and not lacks_head(spec, labels):
        return config
    config = config.copy()
    OmegaConf.set_struct(config, False)
    settings = {
        "_target_": "slim.loading.head.WithHead",
        "base": model,
        "labels": labels,
        "seed": config.seed,
    }
    if trained:
        config.model.base = settings
    else:
        config.model = settings
    return config


def begin_tuned(config: DictConfig) -> DictConfig:
    """Where a tuner comes first, let the chain begin with its result.

    Args:
        config: as Hydra composes it; it stays as it is.
    """
    if not config.get("first"):
        return config
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.model = {
        "_target_": "slim.chain.tuned.Tuned",
        "_convert_": "all",
        "base": OmegaConf.to_container(OmegaConf.create(config.model), resolve=False),
        "tuner": OmegaConf.to_container(config.first, resolve=True),
        "store": config.store,
    }
    return config


def merge_alias(config: DictConfig) -> DictConfig:
    """Read ``quant:`` in an experiment file as ``quantizer:``.

    Args:
        config: as Hydra composes it; it stays as it is.

    Raises:
        SlimError: when the quantizer has no such setting.
    """
    if "quant" not in config:
        return config
    config = config.copy()
    OmegaConf.set_struct(config, False)
    alias = config.pop("quant")
    unknown = [key for key in alias if key not in config.quantizer]
    if unknown:
        raise SlimError(
            f"The quantizer has no setting '{unknown[0]}'. It has: "
            f"{', '.join(config.quantizer) or 'none, since no quantizer is chosen: quant=gptq'}."
        )
    config.quantizer = OmegaConf.merge(config.quantizer, alias)
    return config


def learn_from_teacher(config: DictConfig) -> DictConfig:
    """Where ``teacher.stage=tune``, or the tuner trains scales, let its settings be those of
    the distillation, which takes its place.

    Args:
        config: as Hydra composes it; it stays as it is.

    Raises:
        SlimError: when no tuner is chosen, or one that cannot learn from a teacher.
    """
    target = (config.tuner or {}).get("_target_")
    if not config.teacher:
        return config
    # before the quantizer there is nothing that a teacher could teach them
    if config.teacher.get("stage") != "tune" and target != SCALES:
        return config
    kinds = {
        "slim.training.tune.Lora": "lora",
        "slim.training.qlora.QLora": "qlora",
        "slim.training.tune.Full": "full",
        SCALES: "scales",
    }
    train = kinds.get(target)
    if train is None:
        needed = "it needs tuner=lora or tuner=full or tuner=qlora or tuner=scales"
        raise SlimError(f"teacher.stage=tune makes the tuner learn from the teacher: {needed}.")
    config = config.copy()
    OmegaConf.set_struct(config, False)
    settings = dict(config.tuner)
    del settings["_target_"]
    config.teacher = OmegaConf.merge(config.teacher, settings, {"train": train})
    config.tuner = {}
    return config


def plan_chains(config: DictConfig) -> list[list[Step]]:
    """Plan every chain of a configuration, several where ``model.source`` is a list.

    Args:
        config: as Hydra composes it.

    Raises:
        SlimError: as a run would.
    """
    singles = [config]
    if isinstance(config.model.get("source"), ListConfig):
        singles = one_by_one(config)
    return [build_pipeline(single).plan() for single in singles]


def one_by_one(config: DictConfig) -> list[DictConfig]:
    """Return a configuration for each source. Raises ``SlimError`` for an empty list or one that
    names a source twice."""
    sources = list(map(str, config.model.source))
    wrong = None if sources else "the list is empty"
    for source, count in Counter(sources).items():
        if count > 1:
            wrong = f"{source} is named twice"
            break
    if wrong is not None:
        raise SlimError(
            f"model.source takes different checkpoints, and {wrong}: model.source=[FOLDER,FOLDER]"
        )
    singles = []
    for source in sources:
        single = config.copy()
        OmegaConf.update(single, "model.source", source)
        singles.append(single)
    return singles
