"""Make a model smaller: ``python compress.py model=tiny pruner=taylor tuner=lora quant=awq``."""

from slim.cli.commands import compress

if __name__ == "__main__":
    compress()
