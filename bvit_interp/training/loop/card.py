"""Write the model card of a training run.

It says what the model is, how it was trained, what it scores and what it is good for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from bvit_interp.models import cost
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop.recipe import Recipe

_ABOUT = {
    "digits-s": "generated scenes; the handwritten digits and photographs of the test scenes are"
    " never trained on. The model says nothing about natural images.",
    "imagenette": "photographs of ten ImageNet classes. A squashed copy shows whole photographs at"
    " 224 x 224 px; its 9,103 training images contain none of ImageNet's validation set, so no"
    " image with a bounding box is trained on.",
    "cifar10": "50,000 training and 10,000 test photographs of 32 px. A copy whose pixels differ"
    " from the official files, for instance after a JPEG re-encoding, gives accuracies that are not"
    " comparable to the last point.",
}


def write(
    folder: Path, model: BViT, recipe: Recipe, history: pd.DataFrame, provenance: dict[str, Any]
) -> str:
    """The text of the card.

    Parameters
    ----------
    history : the run's table; the card shows its last scored epoch.
    provenance : what `results.provenance` says of the run.
    """
    last = history.dropna(subset="top1").iloc[-1]
    name, data = folder.resolve().name, recipe.data.partition(":")[0]
    settings = ", ".join(
        f"{key} {value}"
        for key, value in recipe.resume_key().items()
        if key not in ("model", "data")
    )
    arguments = ", ".join(f"{key} {value}" for key, value in recipe.model.items() if key != "name")
    versions = ", ".join(
        f"{library} {version}" for library, version in provenance["versions"].items()
    )
    gflops = cost.flops(model, count_attention=False) / 1e9
    raw = _scores(last, "top1", "top5", "test_loss")
    averaged = _scores(last, "ema_top1", "ema_top5", "ema_loss")
    speed = f"{last['images_per_second']:.0f} images/s"
    return f"""# {name}

{recipe.model["name"]} ({arguments}): {cost.parameters(model):,} parameters, {gflops:.2f} GFLOPs per
image without attention products.

- Data: {data}, {_ABOUT.get(data, "its training split; scored on its evaluation split.")}
- Test accuracy after epoch {int(last["epoch"])} of {recipe.epochs}: raw weights {raw},
  averaged weights (EMA) {averaged}. Per epoch: `history.csv`.
- Check: `bvit-interp evaluate --ckpt {folder} --data {recipe.data}`.
- Made by: `{provenance["command"]}`, {provenance["date"][:10]}, {provenance["machine"]}, {speed}
  ({versions}).
- Recipe: {settings}.
- Open: `bvit_interp.load("{folder}")`, averaged weights as `{folder}@ema`, or
  `timm.create_model("local-dir:{folder}", pretrained=True)` after `import bvit_interp`.
"""


def _scores(row: pd.Series, top1: str, top5: str, loss: str) -> str:
    top5_text = "" if math.isnan(row[top5]) else f"top-5 {100 * row[top5]:.2f} %, "
    return f"{100 * row[top1]:.2f} % ({top5_text}cross-entropy {row[loss]:.3f})"
