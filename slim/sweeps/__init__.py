"""Sweeps: many points from one command, a run in MLflow for each below one for all, resumed where
they ended.

``sweep`` is the whole in the process that was started, ``point`` what happens around one point in
whatever process runs it; both meet in the sweep's folder (``folder``)."""
