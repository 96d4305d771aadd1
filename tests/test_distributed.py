"""Two processes give the tables of one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.models import masks
from bvit_interp.models.checkpoint import save


def run(processes, word, ckpt, out, limit):
    command = [
        "-m",
        "bvit_interp.cli",
        *word.split(),
        "--ckpt",
        ckpt,
        "--limit",
        str(limit),
        "--batch-size",
        "8",
        "--out",
        str(out),
    ]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return pd.read_csv(out / f"{word.split()[0].replace('-', '_')}.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "limit"),
    # with one image the second process has none
    [
        ("pointing-game", 41), ("energy-rank", 41), ("rank-sweep", 41), ("evaluate", 41), ("step-accuracy", 41),
        ("trajectories", 48), ("dynamics", 41), ("dynamics", 1),
        ("attention", 41), ("attention", 1), ("pathways --swaps", 41), ("pathways", 1),
        ("features --steps 1 3 --iterations 2 --chunk 2", 41), ("features --neurons 5 --iterations 1", 1),
        ("pointing-game", 1), ("rank-sweep", 1), ("evaluate", 1),
        ("biography --ablated 5", 41), ("patching --steps 1 3 12 --tokens all cls", 41),
        ("ablation --groups 2 --images 7", 7),
        ("ablation --groups 0 --methods mean zero", 1), ("lens --fit-images 24 --iterations 5", 41),
        ("lens --fit-images 24 --iterations 5", 1), ("step-attribution --folds 6 --sparsities 0.5", 41),
        ("clock --scored 6 --runs 6 --shifts 1", 41), ("circuits --fractions 0.5 --fit-images 16 --draws 1", 41),
        ("circuits --methods gradient learned --epochs 1 --fit-images 16 --fractions 0.5", 1),
        ("stability --jacobian-images 3 --steps 13 --spectra 1 --leading 2 --iterations 3", 7),
        ("stability --jacobian-images 1 --steps 13 --spectra 1 --leading 2 --iterations 3", 3),
    ],
)  # fmt: skip
def test_two_processes_give_the_table_of_one(word, limit, tiny, tmp_path):
    ckpt = str(save(tiny, tmp_path / "tiny"))
    if word.startswith("pathways"):
        generator = torch.Generator().manual_seed(0)
        of = {name: torch.rand(mask.shape, generator=generator) < 0.6 for name, mask in masks.full(tiny).items()}
        masks.Masks(of).save(tmp_path / "tiny" / masks.FILE, tiny)
        ckpt += "@masked"
    one, two = (run(n, word, ckpt, tmp_path / str(n), limit) for n in (1, 2))
    assert list(one) == list(two)
    for column in one.columns.drop("path", errors="ignore"):
        if one[column].dtype == np.float64:
            np.testing.assert_allclose(two[column], one[column], rtol=1e-6, atol=1e-6, err_msg=column)
        else:
            assert one[column].equals(two[column]), column
