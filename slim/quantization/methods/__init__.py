"""The methods of quantization, one file each."""
