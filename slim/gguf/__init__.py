"""GGUF files as sources: what is in them, and how they become plain checkpoint folders
(docs/gguf.md).
"""
