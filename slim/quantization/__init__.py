"""Quantisation: weights as small integers with a scale, and where asymmetric a zero point, per
group."""
