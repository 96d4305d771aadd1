"""How wide and at what does every head look, step by step, and does a head keep looking at the
same?

Beside Fig. 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661), which show where heads
point; these numbers are ours. Per step and head: entropy of the CLS row, attention distance between
patches (Dosovitskiy et al., 2021; Raghu et al., 2021), attention of CLS on itself, registers and
patches and of patches on CLS, and attention rollout (Abnar & Zuidema, 2020). `agreement` is
Pearson's correlation over patches of a head's CLS map at step s with its own at step t. A head of a
bViT is the same weights at every step, in a stack head h of two blocks shares its number alone.

Nulls: `null` is what uniform attention gives (for agreement, different heads at those two steps),
`shuffled` the same maps of different images (what is due to the place of a patch alone), `p_value`
the share of pairings of the heads at s with those at t that agree as well as equal numbers do.
Without a CLS token only the distance is measured; with a memory, the step's own block.

Cost: a forward with the full pattern of one step at a time, B x H x N x N numbers (0.1 GB for
bViT-B and 64 images, about four times that in use); 300 images of 32 px and two models of width 128
take 8 s on one core. Expected: no number is printed; in words, fixed heads localise at middle or
late steps and change their role.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.analyses.attention import COLUMNS, Config
from bvit_interp.analyses.attention.patterns import (
    Attended,
    attend,
    example_maps,
    statistics,
    uniform,
)
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MapPairs, MeanCI
from bvit_interp.probes.probe import Probe
from bvit_interp.results import rank_and_world, replacing


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Attention statistics of every model, step and head.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : images; their labels are not used.
    folder : where the example maps go; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    places = _places(data, config) if folder else []
    probes = {name: Probe(model) for name, model in models.items()}
    tallies = {name: _Tally(probe) for name, probe in probes.items()}
    loader, geometries = config.loader(data, models, "attention")
    for batch in loader:
        for name, probe in probes.items():
            for attended in run_in_halves(
                lambda part, p=probe, g=geometries[name]: attend(
                    p, part.views[g][0].to(_device(p))
                ),
                batch,
            ):
                tallies[name].update(attended)
    tables = []
    for name, probe in probes.items():
        table = pd.DataFrame(tallies[name].rows(config.seed)).assign(model=name)
        path = _keep_examples(name, probe, data, places, geometries[name], config, folder)
        tables.append(table.reindex(columns=list(COLUMNS)).assign(path=path))
    return pd.concat(tables, ignore_index=True).astype({"other_step": "Int64"})


def _device(probe: Probe) -> Any:
    return next(probe.model.parameters()).device


class _Tally:
    """What is kept of one model while images stream by."""

    def __init__(self, probe: Probe) -> None:
        self.probe, steps, heads = probe, probe.num_steps, probe.num_heads
        self.pairs = torch.triu_indices(steps, steps, 1)
        self.moments = {name: MeanCI(steps, heads + 1) for name in statistics(probe)}
        self.maps: dict[str, MapPairs] = {}
        if probe.model.has_class_token:
            self.moments |= {
                "rollout_entropy": MeanCI(steps, 1),
                "rollout_agreement": MeanCI(steps, 1),
            }
            self.moments["agreement"] = MeanCI(self.pairs.shape[1], heads + 1)
            for name, maps in (("agreement", heads), ("rollout_agreement", 2)):
                self.maps[name] = MapPairs(steps, maps, math.prod(probe.grid))
        for metric in (*self.moments.values(), *self.maps.values()):
            metric.to(_device(probe))

    def update(self, attended: Attended) -> None:
        """Add a batch."""
        for name, values in attended.statistics.items():
            self.moments[name].update(_with_mean(values))
        if attended.maps is None or attended.rollout is None:
            return
        maps = metrics.unit_maps(attended.maps)
        own = metrics.correlations(maps.transpose(1, 2)).movedim(1, -1)  # (B, T, T, H)
        self.moments["agreement"].update(_with_mean(own[:, self.pairs[0], self.pairs[1]]))
        self.maps["agreement"].update(maps)
        both = torch.stack([attended.maps.mean(2), attended.rollout[..., -maps.shape[-1] :]], dim=2)
        both = metrics.unit_maps(both)
        self.moments["rollout_agreement"].update(metrics.correlations(both)[..., :1, 1])
        self.moments["rollout_entropy"].update(metrics.entropy(attended.rollout)[..., None])
        self.maps["rollout_agreement"].update(both)

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """The table, without the model's name."""
        found = {
            name: {k: v.numpy() for k, v in moments.compute().items()}
            for name, moments in self.moments.items()
        }
        correlations = {
            name: {k: v.numpy() for k, v in maps.compute().items()}
            for name, maps in self.maps.items()
        }
        scales = {
            "entropy": uniform(self.probe, "entropy"),
            "distance": math.hypot(*self.probe.grid),
        }
        for name, of_name in found.items():
            for i, values in enumerate(of_name["value"]):
                for head in range(len(values)):
                    key = {
                        "statistic": name,
                        "step": i + 1,
                        "head": "mean" if head == len(values) - 1 else str(head),
                    }
                    numbers = {k: v[i, head].item() for k, v in of_name.items() if k != "n"}
                    row = {**key, **numbers, "n": of_name["n"][i, head].item()}
                    if name == "agreement":
                        row |= self._agreement_nulls(correlations[name], i, row["head"], seed)
                    elif name == "rollout_agreement":
                        row["shuffled"] = correlations[name]["other_images"][i, 0, i, 1]
                    else:
                        row["null"] = numbers["null"] = uniform(self.probe, name, i + 1)
                    yield row
                    if name in scales:
                        yield {
                            **row,
                            "statistic": f"{name}_share",
                            **{k: v / scales[name] for k, v in numbers.items()},
                        }

    def _agreement_nulls(
        self, maps: Mapping[str, np.ndarray], pair: int, head: str, seed: int
    ) -> dict[str, Any]:
        """Steps and nulls of one pair of steps, from the correlations ``(T, H, T, H)`` of all
        maps."""
        first, second = self.pairs[:, pair].tolist()
        table, between = (
            maps["same_image"][first, :, second],
            maps["other_images"][first, :, second],
        )
        different = ~np.eye(len(table), dtype=bool)
        nulls: dict[str, Any] = {"step": first + 1, "other_step": second + 1}
        if head == "mean":
            nulls["shuffled"] = _mean(np.diag(between))
            nulls["p_value"] = metrics.pairing_p_value(table, seed)
        else:  # this head at one step with the others at the other
            different[np.arange(len(table)) != int(head)] = False
            different |= different.T
            nulls["shuffled"] = between[int(head), int(head)]
        return {**nulls, "null": _mean(table[different])}


def _with_mean(values: Tensor) -> Tensor:
    """Values ``(..., H)`` and their mean over the heads behind them; nan is left out."""
    return torch.cat([values, values.nanmean(-1, keepdim=True)], dim=-1)


def _mean(values: np.ndarray) -> float:
    """Mean of the numbers among `values`; nan if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _places(data: Samples, config: Config) -> list[int]:
    """Positions of the example images in the data set."""
    if config.images is None:
        return spread(len(data), config.examples) if config.examples else []
    if max(config.images, default=0) >= len(data):
        raise UserError(f"no image {max(config.images)}; images: 0..{len(data) - 1}")
    return list(dict.fromkeys(config.images))


def _keep_examples(
    name: str,
    probe: Probe,
    data: Samples,
    places: list[int],
    geometry: Geometry,
    config: Config,
    folder: Path | None,
) -> str | None:
    """A file with the CLS maps ``(n, T, H, rows, columns)`` of the example images, and the images
    as seen."""
    if not places or folder is None or not probe.model.has_class_token:
        return None
    path = folder / f"attention_{name.replace('/', '_').replace('@', '_')}.npz"
    if rank_and_world()[0] == 0:
        arrays = example_maps(probe, data, places, geometry, config.skip_corrupt)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return str(path)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over heads, without agreements of two steps."""
    return frame[(frame["head"] == "mean") & frame["other_step"].isna()]
