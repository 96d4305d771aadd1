"""Scores of the true class's maps over patches, each with its null."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from bvit_interp.analyses.lens.image_pairs import ImagePairs
from bvit_interp.analyses.lens.prediction_scores import Scores, along_steps
from bvit_interp.metrics import entropy, point_hits, unit_maps
from bvit_interp.metrics.streaming.means import MapCorrelations, MeanCI


class MapScores:
    """Maps of the true class's log probability over the patches after every step, under one lens.

    - `map_entropy`: entropy of the probabilities as shares of the patches; null: the same for the
      other classes;
    - `map_correlation`: correlation with the map of step T; null: with that of another image;
    - with masks `pointing`: whether the maximum of the map lies on the object; null: on the mask of
      another image; and `object_share`: the share of patches that the object covers.

    Parameters
    ----------
    steps, patches : T and P.
    masks : whether the images have masks.
    device : where the logits will be.
    """

    def __init__(self, steps: int, patches: int, masks: bool, device: torch.device) -> None:
        self.steps, self.masks = steps, masks
        self._mean_maps = MeanCI(steps, patches).to(device)
        self._entropies = MeanCI(2, steps).to(device)
        self._correlations = MeanCI(steps).to(device)
        self._other_images = MapCorrelations(steps, 1, patches).to(device)
        self._pointing = MeanCI(2, steps).to(device)
        self._hits = ImagePairs(steps, patches).to(device)
        self._counted = ImagePairs(steps, patches).to(device)

    def update(
        self,
        logits: Float[Tensor, "steps batch patches classes"],
        labels: Int[Tensor, " batch"],
        masks: tuple[Bool[Tensor, "batch patches"], Bool[Tensor, "batch patches"]] | None = None,
    ) -> Float64[Tensor, "batch steps patches"]:
        """Add a batch and return its maps, nats.

        Parameters
        ----------
        masks : patches on the object, and patches that do not count; images without object are left
            out of the pointing.
        """
        log_q = logits.double().log_softmax(-1).permute(1, 0, 3, 2)
        true = labels[:, None, None, None].expand(-1, log_q.shape[1], 1, 1)
        maps = log_q.take_along_dim(true, 2)[:, :, 0]
        self._mean_maps.update(maps)
        entropies = entropy(log_q.softmax(-1))
        of_true = entropies.take_along_dim(true[..., 0], 2)[..., 0]
        of_others = (entropies.sum(-1) - of_true) / (entropies.shape[-1] - 1)
        self._entropies.update(torch.stack([of_true, of_others], 1))
        units = unit_maps(maps)
        varies = units.any(-1) & units[:, -1:].any(-1)
        self._correlations.update(torch.where(varies, (units * units[:, -1:]).sum(-1), torch.nan))
        self._other_images.update(units[:, :, None])
        if masks is not None:
            self._point(maps, *masks)
        return maps

    def mean_maps(self) -> Float64[Tensor, "steps patches"]:
        """Mean map of each step over all images and processes, nats, on the CPU."""
        return self._mean_maps.compute()["value"].reshape(self.steps, -1)

    def compute(self) -> Scores:
        """All metrics over all processes, on the CPU."""
        entropies = self._entropies.compute()
        others = self._other_images.compute()["other_images"].reshape(self.steps, -1)[:, -1]
        scores = {
            "map_entropy": {key: values[0] for key, values in entropies.items()}
            | {"null": entropies["value"][1]},
            "map_correlation": self._correlations.compute() | {"null": others},
        }
        if self.masks:
            pointing = self._pointing.compute()
            hits, counted = self._hits.compute(), self._counted.compute()
            null = {"null": hits["other_images"] / counted["other_images"]}
            scores["pointing"] = {key: values[0] for key, values in pointing.items()} | null
            scores["object_share"] = {key: values[1] for key, values in pointing.items()}
        return along_steps(scores)

    def _point(self, maps: Tensor, positive: Tensor, ignored: Tensor) -> None:
        """Add the pointing of the images that show their object."""
        positive = positive & ~ignored
        shown = positive.any(-1)
        maps, positive, ignored = maps[shown], positive[shown], ignored[shown]
        share = (positive.sum(-1) / (~ignored).sum(-1)).double()
        hits = point_hits(maps, positive, ignored)
        self._pointing.update(torch.stack([hits, share[:, None].expand_as(hits)], 1))
        tied = (maps == maps.amax(-1, keepdim=True)).double()
        pointed = tied / tied.sum(-1, keepdim=True)
        self._hits.update(positive, pointed)
        self._counted.update(~ignored, pointed)
