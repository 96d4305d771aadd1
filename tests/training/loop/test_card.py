"""The model card says what the table and the recipe say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bvit_interp.models import cost
from bvit_interp.training.loop import card
from bvit_interp.training.loop import trainer as run_trainer


def test_the_card_is_of_the_last_scored_epoch(tiny, recipe):
    rows = [
        dict.fromkeys(run_trainer.COLUMNS, float("nan")) | {"epoch": epoch} for epoch in (1, 2, 3)
    ]
    rows[0] |= {
        "top1": 0.11,
        "top5": 0.5,
        "test_loss": 2.0,
        "ema_top1": 0.1,
        "ema_top5": 0.4,
        "ema_loss": 2.2,
    }
    rows[1] |= {
        "top1": 0.12345,
        "top5": 0.56789,
        "test_loss": 1.2345,
        "ema_top1": 0.2,
        "ema_top5": 0.6,
        "ema_loss": 1.5,
        "images_per_second": 321.4,
    }
    made = {
        "command": "bvit-interp train --recipe x",
        "date": "2026-01-02T03:04:05",
        "machine": "an abacus, 2 cores",
        "versions": {"torch": "9.9", "timm": "8.8"},
    }
    plan = recipe(data="cifar10:my/folder", label_smoothing=0.1, model={"patch_drop_rate": 0.5})
    text = card.write(Path("runs/my-run"), tiny, plan, pd.DataFrame(rows), made)
    for part in (
        "# my-run\n",
        "epoch 2 of 2: raw weights 12.35 % (top-5 56.79 %, cross-entropy 1.234)",
        "averaged weights (EMA) 20.00 % (top-5 60.00 %, cross-entropy 1.500)",
        f"{cost.parameters(tiny):,} parameters",
        f"{cost.flops(tiny, count_attention=False) / 1e9:.2f} GFLOPs",
        "JPEG re-encoding",
        "label_smoothing 0.1",
        "patch_drop_rate 0.5",
        "`bvit-interp train --recipe x`, 2026-01-02, an abacus, 2 cores, 321 images/s",
        "torch 9.9, timm 8.8",
        "`bvit-interp evaluate --ckpt runs/my-run --data cifar10:my/folder`",
        "`runs/my-run@ema`",
    ):
        assert part in text
