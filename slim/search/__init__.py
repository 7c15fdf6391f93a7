"""Search: which settings give the best model for a budget, or the best compromises between
objectives.

``settings`` what is looked for, ``budget`` what a model may take, ``metrics`` which figures can be
an objective, ``point`` how good one is, ``space`` and ``sweeper`` which points are tried,
``outcome`` what came of it."""
