"""A little world of people, places, things, numbers and causes, generated from a seed, in plain English.

It is what the embedded tiny model is trained on and examined in: ``World(seed)`` gives documents, conversations and
multiple-choice tasks; ``python -m slim.world`` writes the files shipped under ``slim/assets/tiny_world``.
"""

from slim.world.world import World

__all__ = ["World"]
