"""What a model costs, from its ``config.json`` alone: parameters, and multiply-accumulates of one
forward.

For a sequence of T tokens (``macs_tokens``), with no key/value cache and every token attending to
all T positions, as a plain forward computes them:

    linear     T * sum of out * in over the linear layers of all blocks and of the head
    attention  2 * T^2 * sum over blocks of query heads * head_dim       (Q K^T, and the product with V)

Norms, rotations, softmax, activation functions and embeddings are not counted. A
multiply-accumulate is two floating point operations. ``llm_pruner_macs`` is what LLM-Pruner's
tables show: linear layers, no attention products, and every SiLU output twice, as the tool it uses
counts the module and the function inside it."""

from __future__ import annotations

from slim.models.spec import ModelSpec

MACS_TOKENS = 64  # as in LLM-Pruner's tables


def linear_macs(spec: ModelSpec, block: int, tokens: int) -> int:
    """Count the multiply-accumulates of the linear layers of a block."""
    return tokens * sum(rows * columns for rows, columns in spec.block_linears(block).values())


def attention_macs(spec: ModelSpec, block: int, tokens: int) -> int:
    """Count the multiply-accumulates of a block's attention products."""
    shape = spec.at(block)
    return 2 * tokens * tokens * shape.heads * shape.head_dim


def head_macs(spec: ModelSpec, tokens: int) -> int:
    """Count the multiply-accumulates of the projection to the vocabulary."""
    return tokens * spec.hidden_size * spec.vocab_size


def macs(spec: ModelSpec, tokens: int = MACS_TOKENS) -> int:
    """Count the multiply-accumulates of a forward over ``tokens`` tokens, by the formula above."""
    blocks = range(spec.blocks)
    inside = sum(
        linear_macs(spec, block, tokens) + attention_macs(spec, block, tokens) for block in blocks
    )
    return inside + head_macs(spec, tokens)


def macs_per_token(spec: ModelSpec) -> int:
    """Count the multiply-accumulates of one generated token: linear layers and head, without the
    attention products.

    Those add 2 * query heads * head_dim per block for every token in the cache.
    """
    return sum(linear_macs(spec, block, 1) for block in range(spec.blocks)) + head_macs(spec, 1)


def llm_pruner_macs(spec: ModelSpec, tokens: int = MACS_TOKENS) -> int:
    """Count as LLM-Pruner's tables do: to compare with them, not to predict time."""
    blocks = range(spec.blocks)
    linear = sum(linear_macs(spec, block, tokens) for block in blocks) + head_macs(spec, tokens)
    return linear + 2 * tokens * sum(spec.at(block).intermediate_size for block in blocks)


def account(spec: ModelSpec, tokens: int = MACS_TOKENS) -> dict:
    """Return parameters and multiply-accumulates of a model and of each of its blocks, as plain
    JSON values."""
    return {
        "macs_tokens": tokens,
        "parameters": spec.parameters(),
        "macs": macs(spec, tokens),
        "block_parameters": [spec.block_parameters(block) for block in range(spec.blocks)],
        "block_macs": [
            linear_macs(spec, block, tokens) + attention_macs(spec, block, tokens)
            for block in range(spec.blocks)
        ],
    }


def before_and_after(before: ModelSpec, after: ModelSpec, tokens: int = MACS_TOKENS) -> dict:
    """Return the accounts of a model and of what became of it, with the share that is left of each
    total."""
    first, second = account(before, tokens), account(after, tokens)
    return {
        "macs_tokens": tokens,
        "parameters_before": first["parameters"],
        "parameters_after": second["parameters"],
        "parameters_share": second["parameters"] / first["parameters"],
        "macs_before": first["macs"],
        "macs_after": second["macs"],
        "macs_share": second["macs"] / first["macs"],
        "blocks_before": {"parameters": first["block_parameters"], "macs": first["block_macs"]},
        "blocks_after": {"parameters": second["block_parameters"], "macs": second["block_macs"]},
    }
