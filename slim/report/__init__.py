"""What a run or a sweep came to.

For one chain: ``table`` (the tables, and ``results.json``), ``plan`` (what would run),
``side_by_side`` (comparisons), ``chain_plot`` (its picture), ``card`` and ``loading`` (the model
card, and how to load what it describes).

For many runs ``build`` makes a page and its Markdown. It reads them (``find``, ``runs``), names
their checkpoints (``points``), chooses what to compare (``pareto``), makes the parts (``charts``,
``heatmap``, ``chain_figures``, ``published``, ``sections``), and writes them (``page``,
``markdown``)."""
