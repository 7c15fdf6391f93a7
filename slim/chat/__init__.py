"""Talking to models: in the terminal, and on a page in the browser."""
