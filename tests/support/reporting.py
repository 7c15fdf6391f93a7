"""Runs for the tests of the report, made by hand: records as ``results.json`` has them, with
figures the tests choose."""

from __future__ import annotations

from slim.report.runs import Chain, Row

MACHINE = {"host": "h", "processor": "p", "threads": 1, "torch": "0"}


def record(label: str, digest: str, kind: str, settings: dict | None = None, **figures) -> dict:
    """One record. figures: ``size`` (bytes), ``perplexity``, ``tasks`` (name -> share right),
    ``decode``, ``window``..."""
    quality, tasks = {}, {}
    if "perplexity" in figures:
        quality["perplexity"] = figures["perplexity"]
    if "accuracy" in figures:
        quality["accuracy"] = figures["accuracy"]
    for name, share in figures.get("tasks", {}).items():
        quality |= {
            f"{name}/acc": share,
            f"{name}/acc_stderr": 0.02,
            f"{name}/acc_norm": share,
            f"{name}/acc_norm_stderr": 0.03,
        }
        tasks[name] = {"questions": figures.get("questions", 100)}
    speed = {"decode_tokens_per_second": figures["decode"]} if "decode" in figures else {}
    protocol = {
        "dtype": "float32",
        "perplexity": {"window": figures.get("window", 256)},
        "tasks": {**tasks, "lm_eval": "0"},
    }
    return {
        "checkpoint": label, "folder": f"/none/{digest}", "hash": digest, "cached": False, "seconds": 1.0, "kind": kind,
        "method": None if kind == "source" else label.split()[-1].upper(), "settings": settings or {"source": label},
        "metrics": {"parameters": 1000, "bytes_on_disk": figures.get("size", 1e6), **quality, **speed},
        "measured": {"quality": list(quality), "speed": list(speed)}, "facts": {},
        "protocol": {"quality": protocol, "speed": {"speed": {"dtype": figures.get("dtype", "float32"), "machine": MACHINE}}},
        "curves": figures.get("curves", []), "samples": figures.get("samples", []),
    }  # fmt: skip


def source(**figures) -> dict:
    """The record of the source of all chains."""
    return record(
        "base",
        "0" * 16,
        "source",
        **{"size": 8e6, "perplexity": 5.0, "tasks": {"one": 0.9}, "decode": 50.0} | figures,
    )


def quantized(number: int, settings: dict, **figures) -> dict:
    """The record of a quantised checkpoint."""
    return record(
        "quantize gptq", f"{number:016x}", "quantize", {"class": "GPTQ", **settings}, **figures
    )


def chain(*records: dict, run_id: str = "r", name: str = "run", typed: str = "") -> Chain:
    """A chain as the report reads it."""
    return Chain(run_id, name, typed or name, tuple(Row.from_record(one) for one in records))


def grid() -> list[Chain]:
    """Five of the six points of bits 2, 3, 4 by group size 64, 128; bits 2 with groups of 128 is
    missing."""
    chains = []
    for number, (bits, group) in enumerate([(2, 64), (3, 64), (3, 128), (4, 64), (4, 128)], 1):
        figures = {
            "size": bits * 1e6 + 64e5 / group,
            "perplexity": 5 + 8 / bits**2 + group / 1000,
            "decode": 90.0 - 10 * bits,
        }
        last = quantized(
            number,
            {"bits": bits, "group_size": group},
            **figures,
            tasks={"one": 0.5 + bits / 10, "two": 0.3},
        )
        pruned = record(
            "prune taylor",
            "a" * 16,
            "prune",
            {"class": "Taylor", "blocks": 1},
            size=7e6,
            perplexity=5.5,
        )
        typed = f"quantizer.bits={bits} quantizer.group_size={group}"
        chains.append(
            chain(source(), pruned, last, run_id=f"r{number}", name=f"p{number}", typed=typed)
        )
    return chains
