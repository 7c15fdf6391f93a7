"""What the store holds, which runs use it, and how to get rid of what none needs: ``python -m
slim.cache``."""
