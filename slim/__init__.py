"""slim: make large language models smaller - prune, heal, distil, quantise, evaluate - from one command."""

__version__ = "0.1.0"

from slim import perlayer

perlayer.register()
