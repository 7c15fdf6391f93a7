"""slim's sweeper; Hydra finds sweepers only in the package hydra_plugins."""
