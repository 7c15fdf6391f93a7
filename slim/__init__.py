"""slim: make large language models smaller - prune, heal, distil, quantise, evaluate - from one
command."""

__version__ = "0.1.0"

import logging

from slim.models import heterogeneous as perlayer

perlayer.register()
# bitsandbytes, which PEFT imports, warns of an optional package at import and of every product it
# casts to float16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
