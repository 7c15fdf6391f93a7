"""The studies as experiments: every file composes, its points are those of the study, and a
misspelt name is said."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from slim.chain.build import build_pipeline
from slim.chain.compose import CONF, expand_alias
from slim.checkpoints.source import Source
from slim.cli.experiments import check_experiments
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.data.tiny import TinyChat
from slim.models.spec import ModelSpec
from slim.pruning.magnitude import Magnitude
from tests.cli.test_cli import run

L3, M, L2, TL = (
    "Meta-Llama-3-8B-Instruct",
    "Mistral-7B-Instruct-v0.2",
    "Llama-2-7b-chat-hf",
    "TinyLlama-1.1B-Chat-v1.0",
)
CHOICES = {"mistral7b": M, "llama3_8b": L3, "llama2_7b": L2, "tinyllama": TL}
HEALED = ["Taylor", "Lora"]
CHAINS = [["AWQ"], [*HEALED, "AWQ"], ["Lora"], ["QLora"], ["Angular"], ["Angular"]]
CRITERIA = ("WidthTaylor", "WidthL1", "WidthL2", "WidthRandom")
# name -> the study's models, and the stages of each point of a model, in the order of a nested loop
STUDIES = {
    "thesis/awq": ([M, L3, L2], [["AWQ"]]),
    "thesis/awq_group_size": ([M], [[*HEALED, "AWQ"]] * 3),
    "thesis/awq_vs_gptq": (
        [L3],
        [[*before, method] for before in ([], HEALED) for method in ("GPTQ", "AWQ")],
    ),
    "thesis/gptq_bits": ([M], [["GPTQ"]] * 3),
    "thesis/angular": ([L3, M], [["Angular"]] * 2),
    "thesis/shortened": ([L3, M, L2], [HEALED]),
    "thesis/distill": ([L3, M], [[*HEALED, "distill"]]),
    "thesis/combined": ([L3, M, L2], [[*HEALED, method] for method in ("AWQ", "GPTQ")]),
    "thesis/perplexity": ([L3], [["AWQ"], [*HEALED, "AWQ"]]),
    "thesis/inference": ([M, L3, L2], CHAINS),
    "thesis/originals": ([L3], [["AWQ"], ["AutoAWQ"], ["GPTQ"], ["GPTQModel"]]),
    "tinyllama/width": ([TL], [[criterion] for criterion in CRITERIA for _ in range(3)]),
    "tinyllama/heal": ([TL], [["WidthTaylor", "Lora"]] * 2),
}
# the thesis in small, on SmolLM2 (docs/findings.md): name -> number of points
SMALL = {
    "smollm2/awq": 4,
    "smollm2/gptq": 12,
    "smollm2/heal": 3,
    "smollm2/mixed": 2,
    "smollm2/width": 4,
}
# Sizes of the models as their publishers state them; what the plan of an experiment needs to know.
LLAMA = dict(
    model_type="llama",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
CONFIGS = {
    M: dict(LLAMA, model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None),
    L3: dict(LLAMA, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192),
    L2: dict(LLAMA, vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096),
    TL: dict(LLAMA, vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
             num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048),
}  # fmt: skip
ABOUT_HUB = re.compile(r"[A-Za-z][\w-]*/[\w.-]+")


@cache
def composed(*overrides: str):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("compress", expand_alias(list(overrides)), return_hydra_config=True)


def points(name: str, *typed: str) -> list[list[str]]:
    """Return the overrides of every point of an experiment: all combinations of what its file
    sweeps and is not typed."""
    params = composed(f"experiment={name}", *typed).hydra.sweeper.params
    own = {
        key: str(values).split(",")
        for key, values in params.items()
        if not any(t.startswith(f"{key}=") for t in typed)
    }
    loops = itertools.product(
        *([f"{key}={value}" for value in values] for key, values in own.items())
    )
    return [[f"experiment={name}", *typed, *chosen] for chosen in loops]


def names_of(pipeline) -> list[str]:
    return [
        stage.kind if stage.kind == "distill" else type(stage).__name__ for stage in pipeline.stages
    ]


def test_there_is_a_file_for_every_table():
    found = {
        str(path.relative_to(CONF / "experiment").with_suffix(""))
        for path in (CONF / "experiment").glob("*/*.yaml")
    }
    assert found == STUDIES.keys() | SMALL.keys() | {"domain/study", "workshop/headlines"}


@pytest.mark.parametrize("name", SMALL)
def test_the_points_on_smollm2_are_chains_of_their_own(name):
    """Every point is another chain; the model itself is not needed to see that."""
    chains = set()
    for overrides in points(name):
        pipeline = build_pipeline(composed(*overrides))
        assert pipeline.evaluation.kl
        chains.add(str([stage.cache_key() for stage in pipeline.stages]))
    assert len(chains) == SMALL[name]


@pytest.fixture
def hub(monkeypatch):
    """Let models of the hub be described by their published sizes."""

    def describe(source: Source) -> ModelSpec:
        name = source.source.rpartition("/")[2]
        return ModelSpec(CONFIGS[name], name=name)

    monkeypatch.setattr(Source, "describe", describe)


@pytest.mark.parametrize("name", STUDIES)
def test_the_points_are_those_of_the_study(name, hub):
    """Every point of one model is planned on the published sizes of all: what does not fit would
    raise."""
    models, stages = STUDIES[name]
    config = composed(f"experiment={name}")
    assert (config.hydra.mode.name, config.tracking.experiment) == ("MULTIRUN", name)
    assert config.tracking.published
    every = points(name)
    assert len(every) == len(models) * len(stages)
    swept = (
        [choice for choice, of in CHOICES.items() if of in models] if len(models) > 1 else [None]
    )
    assert {value for point in every for value in point if value.startswith("model=")} == {
        f"model={c}" for c in swept if c
    }
    step = 3 if len(stages) > 6 else 1  # the slow test runs all
    pipelines = [build_pipeline(composed(*overrides)) for overrides in every[: len(stages) : step]]
    assert [names_of(pipeline) for pipeline in pipelines] == stages[::step]
    for pipeline, model in itertools.product(pipelines, models):
        # what is measured needs the network to be checked
        pipeline.model.source, pipeline.evaluation = f"org/{model}", None
        assert len(pipeline.plan()) == len(pipeline.stages) + 1


@pytest.mark.parametrize("name", STUDIES)
def test_the_embedded_model_needs_no_network(name):
    """No setting names anything of the hub, and the plan, which reads the model, has no
    objection."""
    every = points(name, "model=tiny")
    assert len(every) == len(STUDIES[name][1])
    # first and last; the slow test runs all
    for number, overrides in enumerate(every[:: max(1, len(every) - 1)]):
        config = composed(*overrides)
        for part in (
            "model",
            "calibration",
            "pruner",
            "tuner",
            "teacher",
            "quantizer",
            "data",
            "eval",
        ):
            values = flat(
                OmegaConf.to_container(config[part], resolve=True) if config[part] else {}
            )
            values = [value for value in values if not str(value).startswith(config.store)]
            assert not [value for value in values if ABOUT_HUB.fullmatch(str(value))], part
        pipeline = build_pipeline(config)
        # the same for all points
        pipeline.evaluation = pipeline.evaluation if number == 0 else None
        assert len(pipeline.plan()) > 1


def flat(value) -> list:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() if key != "cache_folder" for leaf in flat(item)]
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, list) else [value]


SETTINGS = {
    "thesis/awq": {"quantizer.bits": 4, "quantizer.group_size": 128, "eval.tasks.names": [
        "winogrande", "arc_challenge", "truthfulqa_mc2", "hellaswag", "wikitext"], "eval.tasks.num_fewshot": 0},
    "thesis/shortened": {"tuner.r": 8, "tuner.data.text": "microsoft/ms_marco", "pruner.samples": 10,
                         "pruner.calibration.text": "bookcorpus/bookcorpus"},
    "thesis/distill": {"teacher.method": "dskd", "teacher.model": "base", "tuner.data.text": "microsoft/ms_marco",
                       "teacher.data.text": "databricks/databricks-dolly-15k"},
    "thesis/combined": {"quantizer.bits": 4, "quantizer.group_size": 128, "calibration.text": "mit-han-lab/pile-val-backup",
                        "pruner.calibration.text": "bookcorpus/bookcorpus"},
    "thesis/inference": {"eval.speed": "thesis", "eval.dtype": "float16", "eval.tasks": None},
    "thesis/perplexity": {"eval.documents.text": "EleutherAI/wikitext_document_level"},
    "tinyllama/width": {"pruner.first_block": 4, "pruner.last_block": 17, "pruner.rounding": "llm_pruner",
                        "pruner.calibration.text": "bookcorpus/bookcorpus", "eval.perplexity.window": 128,
                        "eval.tasks.names": ["openbookqa", "winogrande", "hellaswag", "arc_challenge", "arc_easy", "piqa",
                                             "boolq"]},
    "tinyllama/heal": {"tuner.r": 8, "tuner.alpha": 16, "tuner.learning_rate": 1e-4, "tuner.epochs": 2,
                       "tuner.batch_tokens": 64 * 256, "tuner.data.text": "yahma/alpaca-cleaned"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_those_of_the_study(name):
    config = composed(f"experiment={name}")
    assert {key: OmegaConf.select(config, key) for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        (["thesis/angular", "pruner.blocks=0.25"], 8),
        (["thesis/angular", "pruner.blocks=0.375"], 12),
        (["thesis/shortened"], 6),
    ],
)
def test_what_is_removed_is_what_the_study_removed(overrides, blocks):
    pruner = build_pipeline(composed(f"experiment={overrides[0]}", *overrides[1:])).stages[0]
    assert pruner.output_spec(ModelSpec(CONFIGS[M], name=M)).blocks == 32 - blocks


def test_the_width_is_that_of_the_study():
    pruner = build_pipeline(composed("experiment=tinyllama/width", "pruner.ratio=0.3")).stages[0]
    assert pruner.output_spec(ModelSpec(CONFIGS[TL], name=TL)).parameters() == 921_651_200


def test_what_is_typed_wins_over_the_experiment():
    config = composed(
        "experiment=thesis/combined",
        "model=tiny",
        "eval=none",
        "calibration=wikitext2",
        "data=tiny_chat",
    )
    assert config.eval.tasks is None
    assert config.calibration.text == "Salesforce/wikitext"
    assert "examples" not in config.data and config.data._target_.endswith("TinyChat")
    config = composed("experiment=thesis/shortened", "model=tiny", "pruner=magnitude", "tuner=full")
    assert config.pruner._target_.endswith("Magnitude") and config.tuner._target_.endswith("Full")
    embedded = composed("experiment=thesis/awq", "model=mistral7b", "texts=tiny")
    assert (
        embedded.calibration.text == "tiny:calibration"
        and embedded.eval.tasks.names[0] == "tiny_facts"
    )
    assert composed("texts=hub").calibration.text == "Salesforce/wikitext"


def test_a_share_of_the_blocks():
    for share, depth, expected in (
        (0.25, 32, 8),
        (0.375, 32, 12),
        (0.1875, 32, 6),
        (0.25, 8, 2),
        (0.375, 6, 2),
        (0.01, 8, 1),
    ):
        model = ModelSpec({**CONFIGS[TL], "num_hidden_layers": depth}, name="model")
        assert model.blocks - Magnitude(blocks=share).output_spec(model).blocks == expected
    for wrong in (1.5, 0.0, -0.25, 1.0):
        with pytest.raises(SlimError, match=f"pruner.blocks={wrong}: must be .*share"):
            Magnitude(blocks=wrong)
    model = ModelSpec({**CONFIGS[TL], "num_hidden_layers": 8}, name="model")
    with pytest.raises(SlimError, match="blocks=7 is too many"):
        Magnitude(blocks=0.9).check(model)


def test_questions_that_end():
    some, more, endless = TinyChat(examples=5), TinyChat(examples=9), TinyChat()
    assert not some.endless and endless.endless
    assert list(some.pairs("train")) == list(itertools.islice(endless.pairs("train"), 5))
    assert list(some.pairs("validation")) == list(endless.pairs("validation"))
    assert some.cache_key() != more.cache_key() and "examples" not in endless.cache_key()
    with pytest.raises(SlimError, match="data.examples=0"):
        TinyChat(examples=0)


def test_calibration_on_the_first_documents(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert Calibration(str(file), first_documents=2, separator=" ").joined() == "one two"
    assert Calibration(str(file)).joined() == "one\n\ntwo\n\nthree"
    assert {"first_documents", "separator"}.isdisjoint(Calibration(str(file)).cache_key()), (
        "old results keep their names"
    )
    names = [
        Calibration(str(file), first_documents=first, separator=by).cache_key()
        for first in (2, 3)
        for by in (" ", "\n")
    ]
    assert all(one != other for one, other in itertools.combinations(names, 2))
    with pytest.raises(SlimError, match="calibration.first_documents=0"):
        Calibration(str(file), first_documents=0)


WRONG = {
    "defaults:\n  - override /prunner: taylor\n": r"no group 'prunner'.*Did you mean pruner\?",
    "defaults:\n  - override /pruner: tailor\n": r"there is no pruner=tailor.*Did you mean taylor\?",
    "defaults:\n  - override /eval: ${texts}/thesi\n": r"there is no eval=\$\{texts\}/thesi",
    "pruner:\n  bloks: 2\n": r"pruner has no setting 'bloks'.*Did you mean blocks\?",
    "quant:\n  bitz: 2\n": r"quant has no setting 'bitz'.*Did you mean bits\?",
    "tunner:\n  r: 2\n": r"no group or setting 'tunner'.*Did you mean tuner\?",
    "tracking:\n  experimnt: x\n": r"tracking has no setting 'experimnt'.*Did you mean experiment\?",
    "hydra:\n  sweeper:\n    params:\n      quantiser.bits: 3,4\n": r"sweep varies 'quantiser.bits'.*Did you mean quantizer\?",
    "hydra:\n  sweeper:\n    params:\n      quant.bitz: 3,4\n": r"quantizer has no setting 'bitz'",
    "hydra:\n  sweeper:\n    params:\n      model: tiny,mistral\n": r"there is no model=mistral.*Did you mean mistral7b\?",
    "pruner: [\n": r"not YAML",
    "- pruner\n": r"settings \(key: value\) are needed",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_unknown_name_in_a_file_is_said_with_the_file(text, tmp_path):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\n" + text)
    with pytest.raises(SlimError, match=WRONG[text]) as error:
        check_experiments(["experiment=mine", "--config-dir", str(tmp_path)], CONF)
    assert "experiment/mine.yaml" in str(error.value) and len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["pretrain_tiny", *STUDIES, *SMALL])
def test_nothing_in_our_own_files_is_unknown(name):
    check_experiments([f"experiment={name}"], CONF)
    assert (CONF / "experiment" / f"{name}.yaml").read_text().startswith("# @package _global_\n# ")


def test_an_experiment_that_does_not_exist_or_is_for_another_command():
    with pytest.raises(
        SlimError, match=r"experiment=thesis/awk does not exist.*Did you mean thesis/awq\?"
    ):
        check_experiments(["experiment=thesis/awk"], CONF)
    with pytest.raises(
        SlimError, match=r"awq.yaml: evaluate.py has no group 'chain'.* Use: compress.py\."
    ):
        check_experiments(["experiment=thesis/awq"], CONF, "evaluate")
    check_experiments(["experiment=pretrain_tiny"], CONF, "train")
    check_experiments(["experiment=null", "experiment=mine", "hydra.searchpath=[x]"], CONF)


def test_the_command_line_says_it(tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\npruner:\n  bloks: 2\n"
    )
    result = run("experiment=mine", f"--config-dir={tmp_path / 'conf'}", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "slim: conf/experiment/mine.yaml: pruner has no setting 'bloks'."
    )
    assert len(result.stderr.splitlines()) == 1


# Real runs on the embedded model, shortened

SHORT = ["eval.prompts=[]", "calibration.samples=8", "calibration.length=64"]
TRAINED = ["tuner.epochs=null", "tuner.steps=4", "tuner.window=64", "tuner.batch_tokens=256", "tuner.accumulation=1",
           "tuner.validation_tokens=512"]  # fmt: skip
FEW = {  # what makes each short, besides SHORT
    "thesis/awq_group_size": TRAINED,
    "thesis/awq_vs_gptq": TRAINED,
    "thesis/shortened": TRAINED,
    "thesis/distill": [*TRAINED, *(option.replace("tuner.", "teacher.") for option in TRAINED)],
    "thesis/combined": TRAINED,
    "thesis/perplexity": TRAINED,
    "thesis/inference": TRAINED,
    "tinyllama/heal": TRAINED,
}
QUALITY = ["eval.tasks=null", "eval.speed=null", "eval.perplexity.limit=8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_experiment_runs_on_the_embedded_model(name, tmp_path):
    """Each point's last checkpoint differs from those of all others, and so do their figures."""
    speed = name == "thesis/inference"
    short = [*SHORT, *FEW.get(name, []), *([] if speed else QUALITY), f"store={tmp_path / 'runs'}"]
    ends = []
    for overrides in points(name, "model=tiny"):
        trained = "chain=" not in " ".join(overrides) or re.search(
            "chain=(shortened|tuned)", " ".join(overrides)
        )
        pipeline = build_pipeline(composed(*overrides, *(short if trained else untrained(short))))
        if speed:
            assert (
                len(pipeline.evaluation.speed.prompts) == 5
                and pipeline.evaluation.speed.max_length == 200
            )
            pipeline.evaluation.speed = replace(
                pipeline.evaluation.speed, prompts=["Who is Konrad Zuse?"], max_length=24
            )
        results = pipeline.run()
        ends.append(results[-1])
        measured = results[-1].metrics
        assert measured["decode_tokens_per_second"] > 0 if speed else measured["perplexity"] > 1
        if name == "thesis/perplexity":
            assert measured["word_perplexity"] > measured["byte_perplexity"] > 1
    # Four steps may leave a whole model untouched, so that two ways of tuning it give the same
    # files.
    assert len({end.digest if speed else end.content for end in ends}) == len(ends)
    figures = [str({key: end.metrics[key] for key in ("parameters", "bytes_on_disk", "perplexity") if key in end.metrics})
               for end in ends]  # fmt: skip
    assert speed or len(set(figures)) == len(ends), figures
    shutil.rmtree(tmp_path / "runs")


def untrained(options: list[str]) -> list[str]:
    """Leave out settings of tuners, which a chain without one does not have."""
    return [option for option in options if not option.startswith(("tuner.", "teacher."))]


@pytest.mark.slow
def test_the_command_sweeps_by_itself_with_the_typed_model(tmp_path):
    short = [*SHORT, *QUALITY, f"store={tmp_path / 'runs'}"]
    result = run("experiment=thesis/gptq_bits", "model=tiny", *short, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [
        line
        for line in result.stdout.splitlines()
        if "GPTQ" in line or re.search(r"│ [432] ", line)
    ]
    assert len(rows) == 3, result.stdout
    assert Path(tmp_path / "runs" / "mlflow.db").is_file()
