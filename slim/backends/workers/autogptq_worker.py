"""Quantizes with AutoGPTQ, on CUDA.

Settings: bits, group_size, symmetric, desc_act, damp_percent, and more of BaseQuantizeConfig's
under "options". The samples are given as tokens, in their order, one at a time."""

import contract

contract.report_bars()

import torch  # noqa: E402
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # noqa: E402


def main():
    request = contract.read_request()
    settings = request["settings"]
    torch.manual_seed(request["seed"])
    scheme = BaseQuantizeConfig(
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        desc_act=settings["desc_act"],
        damp_percent=settings["damp_percent"],
        **settings["options"],
    )
    model = AutoGPTQForCausalLM.from_pretrained(request["source"], scheme, use_safetensors=True)
    rows = []
    for row in contract.tokens(request):
        rows.append({"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]})
    with contract.Stopwatch():
        model.quantize(rows, batch_size=1, cache_examples_on_gpu=False)
    model.save_quantized(request["target"], use_safetensors=True)
    contract.packages("auto-gptq", "torch", "transformers")
    contract.done()


if __name__ == "__main__":
    main()
