"""Quantizes with GPTQModel: GPTQ, in version 1 of its layout where grids are symmetric, else in 2.

Settings: bits, group_size, symmetric, desc_act, damp_percent, and more of QuantizeConfig's under
"options". The samples are given as tokens, in their order, one at a time."""

import os

import contract

contract.report_bars()
# by default half the processors, and on two of them it fails: one of its pools wants two threads
if (os.cpu_count() or 1) < 4:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402


def report_layers():
    """Report GPTQModel's own bars: what they count differs from bar to bar."""
    try:
        from logbar.progress import ProgressBar
    except ImportError:  # another version: slim then shows time only
        return
    draw = ProgressBar.draw

    def report(bar, *arguments, **settings):
        try:
            total, at = len(bar.iterable), bar.current_iter_step
            if total > 1:
                contract.progress("its own steps", int(at), int(total))
        except (AttributeError, TypeError):
            pass
        return draw(bar, *arguments, **settings)

    ProgressBar.draw = report


def main():
    request = contract.read_request()
    settings = request["settings"]
    torch.manual_seed(request["seed"])
    report_layers()
    scheme = QuantizeConfig(
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        desc_act=settings["desc_act"],
        damp_percent=settings["damp_percent"],
        format="gptq" if settings["symmetric"] else "gptq_v2",
        **settings["options"],
    )
    device = "cuda:0" if request["device"] == "cuda" else "cpu"
    model = GPTQModel.load(request["source"], scheme, device=device, trust_remote_code=False)
    rows = []
    for row in contract.tokens(request):
        rows.append({"input_ids": row, "attention_mask": torch.ones_like(row)})
    with contract.Stopwatch():
        model.quantize(rows, batch_size=1, calibration_sort=None)
    model.save(request["target"])
    contract.packages("gptqmodel", "torch", "transformers")
    contract.done()


if __name__ == "__main__":
    main()
