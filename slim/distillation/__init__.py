"""Distillation: a student learns a teacher's distributions, hidden states or answers."""

CHUNK_ELEMENTS = 2**24  # logits that exist at a time: 64 MiB in float32
