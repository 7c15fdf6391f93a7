"""Checkpoints as models to use: plain and packed weights, adapters."""
