"""Tune or pretrain a model: ``python train.py model=tiny tuner=lora data=tiny``."""

from slim.cli.commands import train

if __name__ == "__main__":
    train()
