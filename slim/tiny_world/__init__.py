"""A little world of people, places, things, numbers and causes, generated from a seed, in plain
English.

It is what the embedded tiny model is trained on and examined in: ``World(seed)`` gives documents,
conversations and multiple-choice tasks; ``python -m slim.tiny_world`` writes the files shipped
under ``slim/assets/tiny_world``."""

from slim.tiny_world.world import World

__all__ = ["GENERATOR", "World"]

# Names what the generator writes, as part of the settings of every result that was trained on its
# text. A test compares the generated text with checksums of its own: whoever changes the text gives
# the generator another name here.
GENERATOR = "6029442868bfc30dd146bbf02f78c30a23624b174cbdee00b27542385f5f95ee"
