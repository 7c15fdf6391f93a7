"""Tuning: what trains, on which batches, with which schedule."""
