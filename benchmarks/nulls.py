"""Make the nulls of the pointing game on photographs: untrained weights, other images' boxes.

    python benchmarks/nulls.py ../shared/data/imagenette ../shared/data/imagenette_boxes_s runs

writes two folders. ``runs/untrained`` gets the models of the four Imagenette recipes before their
first training step. ``runs/other-masks`` gets the photographs, each with the boxes of another one
drawn at random (ImageNet-S layout). ``figures/untrained``, ``figures/other_masks`` and
``figures/trajectories.csv`` are made from them.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

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


def other_masks(boxes: Path, out: Path, seed: int = 0) -> None:
    """Write each image of `boxes` with the mask of another one, relabelled with its own class."""
    images, classes = (
        sorted(boxes.glob("validation/*/*.JPEG")),
        (boxes / "categories.txt").read_text().split(),
    )
    rng, order = np.random.default_rng(seed), np.arange(len(images))
    partners = rng.permutation(len(images))
    while (partners == order).any():
        partners = rng.permutation(len(images))
    for image, partner in zip(images, partners, strict=True):
        wnid, source = image.parent.name, images[partner]
        mask = Image.open(
            boxes / "validation-segmentation" / source.parent.name / f"{source.stem}.png"
        ).convert("RGB")
        ids = np.asarray(mask).astype(int) @ (1, 256, 0)
        drawn = np.zeros((*ids.shape, 3), np.uint8)
        drawn[..., 0] = np.where(ids > 0, classes.index(wnid) + 1, 0)
        for part in ("validation", "validation-segmentation"):
            (out / part / wnid).mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(out / "validation-segmentation" / wnid / f"{image.stem}.png")
        (out / "validation" / wnid / image.name).write_bytes(image.read_bytes())
    (out / "categories.txt").write_text("\n".join(classes))


if __name__ == "__main__":
    data, boxes, out = map(Path, sys.argv[1:])
    untrained(data, out / "untrained")
    other_masks(boxes, out / "other-masks")
