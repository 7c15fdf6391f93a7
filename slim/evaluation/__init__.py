"""Measuring a checkpoint: perplexity, tasks, sample generations, speed, memory."""
