"""GGUF files as sources (what is in them, how they become plain checkpoint folders) and as results
(written from checkpoints, for other engines): docs/gguf.md.
"""
