"""The chain of stages: composed from a configuration, planned, run, measured."""
