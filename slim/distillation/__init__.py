"""Distillation: a student learns a teacher's distributions, hidden states or answers."""
