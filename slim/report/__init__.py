"""What a run or a sweep came to.

``table``: the tables over a chain, and ``results.json``. ``build``: the page and the Markdown over
many runs, from ``runs`` (reading), ``points`` (names), ``measures`` (what is compared), ``charts
heat along published`` (parts), ``sections page markdown`` (the whole). ``chain_plot``: the picture
of one chain."""
