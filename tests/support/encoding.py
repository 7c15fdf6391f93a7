"""Small random encoders of every family, with the embedded model's tokenizer."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta", "modernbert")


def build_encoder(model_type: str, folder: Path, top: str = "classification", **changes) -> Path:
    """Write a small random checkpoint of an encoder.

    Args:
        model_type: Its family.
        folder: That is made.
        top: What stands on top: ``classification``, ``masked`` or ``embedding``.
        **changes: Entries of the config, as BERT calls them.
    """
    import torch
    import transformers

    from slim.checkpoints.writer import copy_companions

    settings = dict(
        vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    settings.update(changes)
    if model_type == "distilbert":
        names = dict(
            hidden_size="dim", num_hidden_layers="n_layers", num_attention_heads="n_heads",
            intermediate_size="hidden_dim", hidden_dropout_prob="dropout",
            attention_probs_dropout_prob="attention_dropout",
        )  # fmt: skip
        settings = {names.get(key, key): value for key, value in settings.items()}
    classes = {
        "classification": "AutoModelForSequenceClassification",
        "masked": "AutoModelForMaskedLM",
        "embedding": "AutoModel",
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = getattr(transformers, classes[top]).from_config(config, dtype=torch.float32)
    with torch.no_grad():  # the default initialisation is so small that blocks hardly matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    copy_companions(ROOT / "slim" / "assets" / "tiny", folder)
    return folder
