"""What a run or a sweep came to: the table over checkpoints (``table``)."""
