"""Sequential calibration: one decoder block after another, with the inputs of its linear layers."""
