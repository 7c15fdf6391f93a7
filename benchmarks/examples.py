"""Runs the command at the head of every quantizer's choice file on the embedded model and writes
what came out.

    python benchmarks/examples.py [docs/examples.md]

So the examples in the documentation are commands that work, with the figures they gave. A few
minutes on two cores."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.report.table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
EXTRA = (
    "python compress.py model=tiny pruner=none quant=gptq quant.group_size=64 quant.bits=auto quant.average_bits=3.25",
    "python compress.py model=tiny pruner=none quant=rtn quant.group_size=64 'quant.overrides={*.down_proj:{bits:8}}'",
    "python compress.py model=tiny pruner=none quant=awq quant.group_size=64 quant.lm_head=true quant.embeddings=true",
    "python compress.py model=tiny pruner=none quant=gptq quant.group_size=64 quant.format=gptq quant.static_groups=false",
)
HEAD = """# Examples

Written by `python benchmarks/examples.py`: the command at the head of every choice of `slim/conf/quantizer/`, and some more, on the
embedded model. Perplexity is that of the tiny world's held-out text, the tasks are accuracies in percent.
"""


def commands() -> list[str]:
    """Return the commands at the head of the choice files, and ``EXTRA``."""
    found = []
    for path in sorted((ROOT / "slim" / "conf" / "quantizer").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [
            line.removeprefix("# ") for line in lines if line.startswith("# python compress.py")
        ]
    return [*found, *EXTRA]


def table(command: str, store: Path) -> str:
    """Run a command's pipeline, quality only, and return its table."""
    overrides = shlex.split(command)[2:]
    return markdown_table(
        build_pipeline(compose("compress", [*overrides, "eval.speed=null", f"store={store}"])).run()
    )


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "examples.md"
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as store:
        for command in commands():
            print(command, flush=True)
            parts.append(f"    {command}\n\n{table(command, Path(store)).strip()}\n")
    target.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
