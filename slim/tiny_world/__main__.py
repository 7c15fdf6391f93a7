"""``python -m slim.tiny_world``: write the files of the little world that are shipped with the
package."""

from slim.tiny_world.assets import write_assets
from slim.tiny_world.world import World

for path in write_assets(World(seed=0)):
    print(f"{path.stat().st_size:>8} bytes  {path}")
