"""What slim must know of a model, from ``config.json`` alone: sizes, families, costs."""
