"""Pruning: removing parts of a model, one file per criterion."""
