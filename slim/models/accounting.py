"""What a model costs, from its ``config.json`` alone: parameters, and the multiply-accumulates of
one forward pass.

For a sequence of T tokens (``macs_tokens``), with no key/value cache and every token attending to
all T positions, as a plain forward pass computes them:

    linear     T * sum of out * in over the linear layers of all blocks and of the head
    attention  2 * T^2 * sum over blocks of query heads * head_dim   (Q K^T, and the product with V)

Norms, rotations, softmax, activation functions and embeddings are not counted. A
multiply-accumulate is two floating point operations. ``llm_pruner_macs`` is what LLM-Pruner's
tables show: linear layers, no attention products, and every SiLU output twice, as the tool it uses
counts the module and the function inside it."""

from __future__ import annotations

from slim.models.spec import ModelSpec

MACS_TOKENS = 64  # as in LLM-Pruner's tables


def linear_macs(spec: ModelSpec, block: int, tokens: int) -> int:
    """Count the multiply-accumulates of the linear layers of a block.

    Args:
        spec: The model.
        block: The block's number.
        tokens: Length of the sequence.
    """
    return tokens * sum(rows * columns for rows, columns in spec.block_linears(block).values())


def attention_macs(spec: ModelSpec, block: int, tokens: int) -> int:
    """Count the multiply-accumulates of a block's attention products.

    Args:
        spec: The model.
        block: The block's number.
        tokens: Length of the sequence.
    """
    shape = spec.at(block)
    return 2 * tokens * tokens * shape.heads * shape.head_dim


def block_macs(spec: ModelSpec, tokens: int) -> list[int]:
    """Count the multiply-accumulates of every block, in order.

    Args:
        spec: The model.
        tokens: Length of the sequence.
    """
    counts = []
    for block in range(spec.blocks):
        counts.append(linear_macs(spec, block, tokens) + attention_macs(spec, block, tokens))
    return counts


def head_macs(spec: ModelSpec, tokens: int) -> int:
    """Count the multiply-accumulates of the projection to the vocabulary.

    Args:
        spec: The model.
        tokens: Length of the sequence.
    """
    if spec.is_encoder:  # a head for classes is read once for a text, not for every token
        return 0
    return tokens * spec.hidden_size * spec.vocab_size


def macs(spec: ModelSpec, tokens: int = MACS_TOKENS) -> int:
    """Count the multiply-accumulates of a forward pass, by the formula above.

    Args:
        spec: The model.
        tokens: Length of the sequence.
    """
    return sum(block_macs(spec, tokens)) + head_macs(spec, tokens)


def macs_per_token(spec: ModelSpec) -> int:
    """Count the multiply-accumulates of one generated token: linear layers and head, without the
    attention products.

    Those add 2 * query heads * head_dim per block for every token in the cache.

    Args:
        spec: The model.
    """
    return linear_total(spec, 1)


def linear_total(spec: ModelSpec, tokens: int) -> int:
    """Count the multiply-accumulates of all linear layers, the head included.

    Args:
        spec: The model.
        tokens: Length of the sequence.
    """
    inside = sum(linear_macs(spec, block, tokens) for block in range(spec.blocks))
    return inside + head_macs(spec, tokens)


def llm_pruner_macs(spec: ModelSpec, tokens: int = MACS_TOKENS) -> int:
    """Count as LLM-Pruner's tables do: to compare with them, not to predict time.

    Args:
        spec: The model.
        tokens: Length of the sequence.
    """
    channels = sum(spec.at(block).intermediate_size for block in range(spec.blocks))
    return linear_total(spec, tokens) + 2 * tokens * channels


def account(spec: ModelSpec, tokens: int = MACS_TOKENS) -> dict:
    """Count a model's parameters and multiply-accumulates.

    Args:
        spec: The model.
        tokens: Length of the sequence.

    Returns:
        Plain JSON values: ``macs_tokens``, the totals ``parameters`` and ``macs``, and the lists
        ``block_parameters`` and ``block_macs``.
    """
    return {
        "macs_tokens": tokens,
        "parameters": spec.parameters(),
        "macs": macs(spec, tokens),
        "block_parameters": [spec.block_parameters(block) for block in range(spec.blocks)],
        "block_macs": block_macs(spec, tokens),
    }


def before_and_after(before: ModelSpec, after: ModelSpec, tokens: int = MACS_TOKENS) -> dict:
    """Count a model and what became of it.

    Args:
        before: The model.
        after: What became of it.
        tokens: Length of the sequence.

    Returns:
        Plain JSON values: totals ``..._before``, ``..._after`` and ``..._share`` (what is left),
        and ``blocks_before`` and ``blocks_after`` with ``parameters`` and ``macs`` per block.
    """
    first = account(before, tokens)
    second = account(after, tokens)
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
