"""Texts, calibration samples and training examples."""
