"""Quantizes with AutoAWQ, in its GEMM format.

Settings: bits, group_size, symmetric, duo_scaling, apply_clip, parallel_samples. The samples are
given as tokens of one length, which AutoAWQ joins and cuts into the same samples again."""

import contract

contract.report_bars()

import torch  # noqa: E402
from awq import AutoAWQForCausalLM  # noqa: E402


def main():
    request = contract.read_request()
    settings = request["settings"]
    torch.manual_seed(request["seed"])
    model = AutoAWQForCausalLM.from_pretrained(
        request["source"], torch_dtype="auto", device_map=None, use_cache=False, safetensors=True
    )
    rows = contract.tokens(request).tolist()
    scheme = {
        "zero_point": not settings["symmetric"],
        "q_group_size": settings["group_size"],
        "w_bit": settings["bits"],
        "version": "GEMM",
    }
    with contract.Stopwatch():
        model.quantize(
            None,
            quant_config=scheme,
            calib_data=rows,
            max_calib_samples=len(rows),
            max_calib_seq_len=len(rows[0]),
            duo_scaling=settings["duo_scaling"],
            apply_clip=settings["apply_clip"],
            n_parallel_calib_samples=settings["parallel_samples"],
            **settings["options"],
        )
    model.save_quantized(request["target"], safetensors=True)
    contract.packages("autoawq", "torch", "transformers")
    contract.done()


if __name__ == "__main__":
    main()
