"""Search: budgets against real files and caches, fronts against brute force, trials that are
distinct and come again."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from slim.chain.compose import CONF, compose
from slim.cli.commands import run_compress as main
from slim.cli.launch import launch
from slim.core.errors import SlimError
from slim.quantization.storage import weight_bytes
from slim.search.budget import Budget, OverBudget, cache_bytes
from slim.search.metrics import is_better_high, offered, require_metric
from slim.search.outcome import Trial, best, conclude
from slim.search.point import judge, values
from slim.search.settings import Search
from slim.search.space import Space, fixed_overrides
from slim.search.sweeper import Run, quiet_optuna
from tests.conftest import FAMILIES, build_small
from tests.support.tracked import fresh_store
from tests.sweeps.test_sweeps import kinds

pytest.importorskip(
    "hydra_plugins.hydra_optuna_sweeper", reason="the extra slim[search] is not installed"
)

RTN = ["pruner=none", "quant=rtn", "hydra.sweeper.n_trials=20"]
SHORT = [
    "eval=quick",
    "eval.tasks=null",
    "eval.speed=null",
    "eval.prompts=[]",
    "eval.perplexity.limit=2",
    "eval.perplexity.window=32",
]


@pytest.fixture
def search(small_llama, tmp_path, monkeypatch, capsys):
    """Run ``compress.py`` in this process; returns the exit code, output, errors and what
    ``search.json`` says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, mistaken: bool = False) -> tuple[int, str, str, dict | None]:
        if not mistaken and not (tmp_path / "runs").exists():
            fresh_store(tmp_path / "runs")
        typed = [
            "model=hf",
            f"model.source={small_llama}",
            f"store={tmp_path / 'runs'}",
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", ["compress.py", *typed])
        with pytest.raises(SystemExit) as ended:
            launch("compress", main)
        files = list(tmp_path.glob("multirun/*/*/search.json"))
        found = json.loads(files[0].read_text()) if files else None
        shutil.rmtree(tmp_path / "multirun", ignore_errors=True)
        return ended.value.code, *capsys.readouterr(), found

    return run


def evaluation(*overrides: str):
    from hydra.utils import instantiate

    return instantiate(compose("compress", list(overrides)).eval)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_large_as_transformers_makes_it(family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from slim.checkpoints.checkpoint import open_checkpoint

    folder = build_small(family, tmp_path / family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.arange(40)[None] + 5).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    counted = cache_bytes(open_checkpoint(folder).spec, 40)
    sliding = [layer for layer in cache.layers if layer.keys.shape[2] < 40]
    # it drops the token that leaves next
    spare = sum(2 * layer.keys.nbytes // layer.keys.shape[2] for layer in sliding)
    assert bool(sliding) == (family in ("mistral", "qwen2"))
    assert counted == held + spare


def test_the_cache_holds_no_more_than_the_models_context(small_llama):
    from slim.checkpoints.checkpoint import open_checkpoint

    spec = open_checkpoint(small_llama).spec
    assert cache_bytes(spec, 10**6) == cache_bytes(spec, 256) == 256 * cache_bytes(spec, 1)
    assert cache_bytes(spec, 0) == 0


def test_a_plan_over_the_budget_is_refused_with_what_it_needs(small_llama):
    from slim.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(small_llama)
    # blocks, keys and values, heads, size, float32
    needed = weight_bytes(checkpoint.spec) + 100 * 6 * 2 * 2 * 16 * 4
    assert needed == pytest.approx(checkpoint.bytes_on_disk + 100 * 6 * 2 * 2 * 16 * 4, rel=0.01)
    Budget(memory_gb=needed / 1e9, context=100).check_plan(checkpoint.spec)
    with pytest.raises(OverBudget, match="over budget.memory_gb=.* by its plan") as refused:
        Budget(memory_gb=(needed - 1) / 1e9, context=100).check_plan(checkpoint.spec)
    assert refused.value.needed == needed and refused.value.skipped


def test_what_is_promised_is_measured(small_llama):
    from slim.evaluation.run import measure

    short = [
        "eval.tasks.names=[tiny_facts]",
        "eval.tasks.limit=2",
        "eval.perplexity.limit=1",
        "eval.perplexity.window=32",
    ]
    speed = [
        f"eval.speed.{name}={value}"
        for name, value in dict(count=1, repeats=1, new_tokens=2, prompt_length=8).items()
    ]
    protocol = evaluation(*short, *speed, "eval.new_tokens=8")
    found = measure(small_llama, protocol)
    measured = {**found["quality"]["metrics"], **found["speed"]["metrics"]}
    counted = {"bytes_on_disk", "parameters", "macs_per_token"}
    assert set(offered(protocol)) <= set(measured) | counted
    spreads = {name for name in measured if name.endswith(("_stderr", "_iqr"))}
    for name in set(measured) - spreads:
        require_metric("search.objectives", name, protocol)
    for name in spreads:
        with pytest.raises(SlimError, match="no such figure"):
            require_metric("search.objectives", name, protocol)


@pytest.mark.parametrize(
    ("metric", "high"),
    [
        ("perplexity", False),
        ("wikitext/word_perplexity", False),
        ("wikitext/bits_per_byte", False),
        ("lambada_openai/perplexity", False),
        ("bytes_on_disk", False),
        ("time_to_first_token", False),
        ("energy_joules_per_token", False),
        ("repeated_4grams", False),
        ("tasks/acc", True),
        ("hellaswag/acc_norm", True),
        ("gsm8k/exact_match/strict-match", True),
        ("similarity/mean", True),
        ("similarity/median", True),
        ("decode_tokens_per_second", True),
        ("prefill_tokens_per_second", True),
    ],
)
def test_which_way_is_better(metric, high):
    assert is_better_high(metric) == high


def trial(number: int, problem: str | None = None, **objectives: float) -> Trial:
    result = {
        "objectives": objectives,
        "problem": problem,
        "tokens_per_second": None,
        "memory_bytes": 1e6,
        "folder": "x",
    }
    return Trial(number, {"quantizer.bits": number}, result=result)


def test_the_front_is_that_of_brute_force():
    generator = random.Random(0)
    for _ in range(30):
        points = [(generator.randint(0, 6), generator.randint(0, 6)) for _ in range(20)]
        trials = [
            trial(n, perplexity=float(x), **{"tasks/acc": float(y)})
            for n, (x, y) in enumerate(points)
        ]
        trials += [
            trial(99, "takes 9 GB", perplexity=-1.0, **{"tasks/acc": 99.0}),
            Trial(100, {}, error="failed"),
        ]
        front = {
            (x, y)
            for x, y in points
            if not any((a < x and b >= y) or (a <= x and b > y) for a, b in points)
        }
        found = best(trials, ["perplexity", "tasks/acc"])
        assert [points[t.number] for t in found] == sorted(front, key=lambda point: -point[1]), (
            "each once, the best task first"
        )
        assert all(t.number == points.index(points[t.number]) for t in found), (
            "of equal points the first"
        )


def test_a_point_that_is_slower_than_asked_is_out_of_the_contest(small_llama, tmp_path):
    from slim.checkpoints.checkpoint import open_checkpoint

    wanted = Search(objectives=["perplexity"], budget=Budget(tokens_per_second=50))
    spec = open_checkpoint(small_llama).spec
    figures = {
        "perplexity": 3.0,
        "bytes_on_disk": 10,
        "parameters": 5,
        "decode_tokens_per_second": 50.0,
    }
    assert judge(wanted, figures, spec)["problem"] is None
    slow = judge(wanted, {**figures, "decode_tokens_per_second": 49.9}, spec)
    assert slow["problem"] == "decodes 49.9 tokens/s"
    assert (
        judge(wanted, {**figures, "perplexity": float("nan")}, spec)["problem"]
        == "perplexity is not finite"
    )
    with pytest.raises(
        SlimError,
        match=r"objectives=perplexity: no such figure was measured. There are: bytes_on_disk",
    ):
        judge(wanted, {"bytes_on_disk": 10, "parameters": 5}, spec)
    with pytest.raises(
        SlimError,
        match=r"None of the points that were run \(1\) .*quantizer.bits=3 decodes 49.9 tokens/s",
    ):
        conclude([Trial(0, {"quantizer.bits": 3}, result=slow)], wanted, tmp_path)


def test_a_job_returns_its_objectives():
    one = compose(
        "compress", ["hparams_search=budget", "budget.memory_gb=1", "budget.quality=tasks/acc"]
    )
    assert values(one, {"tasks/acc": 0.5, "perplexity": 3.0}) == 0.5
    several = compose(
        "compress", ["hparams_search=pareto", "search.objectives=[bytes_on_disk,tiny_facts/exact]"]
    )
    first, second = values(several, {"bytes_on_disk": 10})
    assert first == 10 and math.isnan(second)


def read(params: dict, *typed: str) -> Space:
    return Space.read(params, list(typed), fixed_overrides(list(typed)))


def test_what_is_typed_wins_over_the_files_search_space():
    file = {
        "quantizer.bits": "choice(2,3,4,8)",
        "quantizer.group_size": "choice(32,64)",
        "quantizer": "choice(rtn,hqq)",
    }
    space = read(
        file,
        "quantizer=rtn",
        "quantizer.bits=2,3",
        "seed=1",
        "~tracking.uri",
        "++pruner.factor=choice(1,2)",
    )
    assert list(space.fixed.values()) == ["quantizer=rtn", "seed=1", "~tracking.uri"]
    assert {key: values.choices for key, values in space.varying.items()} == {
        "quantizer.bits": (2, 3),
        "quantizer.group_size": (32, 64),
        "++pruner.factor": (1, 2),
    }
    assert space.size == 8
    with pytest.raises(SlimError, match="search space cannot be read"):
        read({"quantizer.damping": "interval(0.3,0.1)"})


def test_a_point_that_was_tried_gives_way_to_the_nearest_that_was_not():
    space = read({"a": "choice(1,2,3)", "c": "range(1,3)"}, "b=true,false")
    everything = [
        dict(zip("abc", point, strict=True))
        for point in itertools.product((1, 2, 3), (True, False), (1, 2, 3))
    ]
    assert space.size == len(everything) == 18
    generator, point = random.Random(0), everything[0]
    for _ in everything:
        assert not space.exhausted
        other = space.nearest_new(point, generator)
        distance = {key_distance(point, left) for left in everything if space.is_new(left)}
        assert space.is_new(other) and key_distance(point, other) == min(distance)
        space.add(other)
    assert space.exhausted
    assert space.overrides({"a": 1, "b": False, "c": 2}) == ["a=1", "b=false", "c=2"]


def key_distance(one: dict, other: dict) -> int:
    return sum(one[key] != other[key] for key in one)


def test_the_best_within_a_budget_and_the_same_trials_again(search, tmp_path):
    command = [
        *RTN,
        *SHORT,
        "hparams_search=budget",
        "budget.memory_gb=0.00058",
        "budget.context=0",
    ]
    command += ["quant.bits=2,3,8", "quant.group_size=32", "seed=3"]
    code, _, err, found = search(*command)
    assert code == 0, err
    assert "pruner.blocks is not searched" in err
    assert sorted(point["settings"]["quantizer.bits"] for point in found["points"]) == [2, 3, 8]
    runs = kinds(tmp_path / "runs")
    (whole,) = runs["sweep"]
    for run in runs["run"]:
        too_large = "quantizer.bits=8" in run.info.run_name
        assert run.data.tags["mlflow.parentRunId"] == whole.info.run_id
        assert run.info.status == ("FAILED" if too_large else "FINISHED")
        assert run.data.tags.get("slim.skipped") == ("true" if too_large else None)
        if too_large:
            assert "over budget.memory_gb=0.00058 by its plan: " in run.data.tags["error"]
    measured = {
        run.info.run_name: run.data.metrics for run in runs["run"] if run.info.status == "FINISHED"
    }
    assert len(measured) == 2 and all(
        metrics["bytes_on_disk"] <= 0.58e6 for metrics in measured.values()
    )
    lowest = min(measured, key=lambda name: measured[name]["perplexity"])
    (chosen,) = found["best"]
    assert chosen["objectives"]["perplexity"] == measured[lowest]["perplexity"]
    assert f"quantizer.bits={chosen['settings']['quantizer.bits']}" in lowest
    states = {point["settings"]["quantizer.bits"]: point["state"] for point in found["points"]}
    assert states == {2: "good", 3: "good", 8: "skipped"}

    made = sorted((tmp_path / "runs" / "stages").iterdir())
    times = [folder.stat().st_mtime_ns for folder in made]
    code, _, err, again = search(*command)
    assert code == 0, err
    assert again == found, "the same trials in the same order with the same figures"
    assert (
        sorted((tmp_path / "runs" / "stages").iterdir()) == made
        and [f.stat().st_mtime_ns for f in made] == times
    )
    assert len(kinds(tmp_path / "runs")["run"]) == 3


def proposals(seed: int, count: int, params: dict, value) -> list[tuple]:
    """The first points that a search proposes where ``value`` is what a point is worth."""
    settings = OmegaConf.load(CONF / "hydra" / "sweeper" / "search.yaml")
    settings.sampler.seed = seed
    config = OmegaConf.create({"seed": seed})
    quiet_optuna()
    run = Run(
        SimpleNamespace(settings=settings, config=config),
        read(params),
        Search(objectives=["perplexity"]),
    )
    found = []
    while len(found) < count and not run.space.exhausted:
        trial = run.ask()
        run.study.tell(trial.asked, value(**trial.point))
        found.append(tuple(trial.point.values()))
    return found


def test_no_point_is_proposed_twice_and_the_seed_chooses_them():
    space = {"a": "choice(1,2,3,4)", "b": "choice(1,2,3)", "c": "choice(1,2,3)"}
    worth = lambda a, b, c: float("inf") if a == 4 else a + b + c  # noqa: E731
    orders = [proposals(seed, 100, space, worth) for seed in (0, 0, 1)]
    everything = set(itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3)))
    assert all(len(order) == 36 and set(order) == everything for order in orders)
    assert orders[0] == orders[1] != orders[2]


def test_proposals_learn_from_what_was_found():
    """Of 400 points, 40 proposals come nearer to the best one than 40 at random do, over ten
    seeds."""
    space, worth = {"a": "range(0,19)", "b": "range(0,19)"}, lambda a, b: abs(a - 13) + abs(b - 4)
    searched, drawn = [], []
    for seed in range(10):
        searched.append(min(worth(*point) for point in proposals(seed, 40, space, worth)))
        generator = random.Random(seed)
        drawn.append(
            min(worth(generator.randrange(20), generator.randrange(20)) for _ in range(40))
        )
    assert sum(searched) < sum(drawn)


def test_a_point_that_fails_does_not_end_a_search(search):
    command = [
        *RTN,
        "eval=none",
        "hparams_search=pareto",
        "search.objectives=[bytes_on_disk,parameters]",
    ]
    code, _, err, found = search(*command, "quant.bits=4,5", "quant.group_size=32")
    assert code == 2, err
    states = {
        point["settings"]["quantizer.bits"]: (point["state"], point["problem"])
        for point in found["points"]
    }
    assert states[4] == ("good", None)
    assert states[5][0] == "failed" and "quant.bits=5: must be" in states[5][1]


WRONG = [
    (
        ["hparams_search=paretto"],
        "hparams_search=paretto: must be one of budget, pareto. Did you mean pareto?",
    ),
    (["hparams_search=budget"], "needs a budget: budget.memory_gb=4"),
    (["hparams_search=budget", "budget.memory_gb=-1"], "budget.memory_gb=-1: must be"),
    (
        ["hparams_search=budget", "budget.memory_gb=1", "budget.context=1.5"],
        "budget.context=1.5: must be",
    ),
    (
        ["hparams_search=budget", "budget.memory_gb=1", "budget.quality=perplexitty"],
        "Did you mean perplexity?",
    ),
    (
        ["hparams_search=budget", "budget.tokens_per_second=9", "eval.speed=null"],
        "eval.speed=null measures no speed",
    ),
    (
        ["hparams_search=pareto", "search.objectives=[perplexity,speed]"],
        "search.objectives=speed: no such figure",
    ),
    (["hparams_search=pareto", "search.objectives=[]"], "one to 3 different metrics"),
    (
        ["hparams_search=pareto", "search.objectives=[perplexity,perplexity]"],
        "one to 3 different metrics",
    ),
    (["hparams_search=pareto", "eval=none"], "no such figure will be measured"),
    (
        ["hparams_search=pareto", "hydra.sweeper.n_trials=0"],
        "hydra.sweeper.n_trials=0: must be",
    ),
    (["hparams_search=pareto", "plan=true"], "plan=true shows a run or a grid"),
    (["hparams_search=pareto", "pruner=none", "quant=none"], "nothing to search"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG]
)
def test_a_mistake_is_said_before_anything_is_done(search, tmp_path, arguments, message):
    code, out, err, _ = search(*arguments, mistaken=True)
    assert (code, out) == (2, "")
    assert message in err
    assert [line for line in err.splitlines() if line.startswith("slim: ")], err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_no_point_meets(search, tmp_path):
    command = [
        *RTN,
        "hparams_search=budget",
        "budget.memory_gb=0.0001",
        "quant.bits=3,2",
        "quant.group_size=64",
    ]
    code, _, err, found = search(*command, *SHORT)
    assert code == 2
    assert "No point meets budget.memory_gb=0.0001: the smallest of 2 would take" in err
    assert "(quantizer.bits=2)" in err and "Nothing was run." in err
    assert [point["state"] for point in found["points"]] == ["skipped"] * 2
    assert not (tmp_path / "runs" / "stages").exists()
    assert {run.info.status for run in kinds(tmp_path / "runs")["run"]} == {"FAILED"}


def test_a_missing_package_is_named(search, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err, _ = search("hparams_search=pareto", "pruner=none", "quant=rtn", mistaken=True)
    assert code == 2 and "pip install 'slim[search]'" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_search_of_the_tiny_model_finds_the_front_of_all_points(search):
    """All points of the space: the front, and the best within a budget, are those of their
    figures."""
    space = [
        "model=tiny",
        "model.source=tiny",
        "pruner=taylor",
        "quant=rtn",
        "quant.bits=2,3,4",
        "quant.group_size=32,64,128",
        "pruner.blocks=1,2,3",
    ]
    short = ["eval.tasks=null", "eval.speed=null", "eval.prompts=[]", "eval.perplexity.limit=16"]
    code, _, err, found = search(
        *space, *short, "hparams_search=pareto", "hydra.sweeper.n_trials=27"
    )
    assert code == 0, err
    figures = [tuple(point["objectives"].values()) for point in found["points"]]
    assert len(figures) == 27
    front = {
        (x, y)
        for x, y in figures
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in figures)
    }
    assert {tuple(point["objectives"].values()) for point in found["best"]} == front
    limit = (sorted(point["memory_bytes"] for point in found["points"])[13] + 1) / 1e9
    within = [
        point["objectives"]["perplexity"]
        for point in found["points"]
        if point["memory_bytes"] <= limit * 1e9
    ]
    command = [
        *space,
        *short,
        "hparams_search=budget",
        f"budget.memory_gb={limit}",
        "hydra.sweeper.n_trials=27",
    ]
    code, _, err, found = search(*command)
    assert code == 0, err
    assert found["best"][0]["objectives"]["perplexity"] == min(within)
