"""Other tools as stages: each in an environment of its own, asked by JSON, answering by JSON."""
