"""Packed weights at work: packing, unpacking, multiplying."""
