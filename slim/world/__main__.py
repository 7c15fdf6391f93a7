"""``python -m slim.world``: write the files of the little world that are shipped with the package."""

from slim.world.assets import write_assets
from slim.world.world import World

for path in write_assets(World(seed=0)):
    print(f"{path.stat().st_size:>8} bytes  {path}")
