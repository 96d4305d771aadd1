"""Make untrained models of the four Imagenette recipes: a null for trained weights.

    python benchmarks/nulls.py ../shared/data/imagenette runs/untrained

writes a checkpoint of each recipe before its first training step. `figures/trajectories.csv` has
one of them as a row. The pointing game needs none of them: its own table has random weights of the
same shape, and the masks of other images.
"""

import sys
from pathlib import Path

from bvit_interp.data.catalog import open_samples
from bvit_interp.models import checkpoint
from bvit_interp.training.loop import recipe
from bvit_interp.training.loop.build import make_model

RECIPES = ("imagenette", "imagenette-vit", "imagenette-d128", "imagenette-d128-vit")


def untrained(data: Path, out: Path) -> None:
    """Write one checkpoint per recipe, with its first weights; whole images are used."""
    samples = open_samples(f"imagenette:{data}", "train")
    for name in RECIPES:
        model = make_model(recipe.read(name), samples)
        model.pretrained_cfg |= {"crop_pct": 1.0}
        kind = "vit" if name.endswith("-vit") else "bvit"
        checkpoint.save(
            model, out / f"{kind}-{name.removesuffix('-vit')}-untrained", f"# {name}, untrained\n"
        )


if __name__ == "__main__":
    untrained(*map(Path, sys.argv[1:]))
