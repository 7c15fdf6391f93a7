"""slim's search; Hydra finds sweepers only in the package hydra_plugins."""
