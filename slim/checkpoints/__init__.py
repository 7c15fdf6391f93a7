"""Checkpoint folders: opened, read, written, named, kept; what a source and a stage are."""
