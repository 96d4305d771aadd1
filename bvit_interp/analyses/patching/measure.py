"""Activation patching across the steps of a model.

Ours; not in bViT (arXiv 2605.10661). A site of step s of run A (the whole state z_s, or one token
set, head or neuron of any site) replaces that of step t of run B, for all s and t. A row is one
cell (s, t), or the mean of all cells of one shift t - s. The metrics are:

- `recovered`: ``sum(patched - baseline) / sum(clean - baseline)`` over images, a ratio of means
  with a delta-method interval. Mode `same`: A = B, one image; the logit difference is the logit of
  the true class minus the mean of the others', and the baseline is 0: the share of the answer that
  is kept under a shift in time. Mode `other`: A is another image; the logit difference is the logit
  of A's class minus that of B's, clean in A, baseline in B; pairs of one class are skipped and
  counted. Mode `corrupted`: B is the image with its patches shuffled or with noise, A the image
  itself; the logit difference is that of `same`.
- `agreement`: the share of images that get the clean run's most likely class, with Wilson's
  interval (for the mean share of a shift it is too wide, not too narrow).

The `null` is the same patch from one more image, at the same steps: the effect of any state of step
s at step t. Each image is also the other image of another one (for an even number of images each
pair occurs in both directions), so intervals of `other` may be too narrow by up to sqrt 2. For the
whole state of one shared block (no time embedding, no memory) cell (s, t) is ``F^(T-t)(z_s)``, the
answer s - t steps past T: B does not matter, cells of one shift are equal, and one longer run gives
all of them. In a stack, runs patched with whole states do not depend on B either: `other` is then
`same` on another scale. With a memory, a time embedding or part of a state, the cells of a shift
differ, and their mean depends on the steps s and t it covers. So they may in a loop of another
model's own, where all that a step reads besides the state (injected input, earlier states) stays
that of the run B. Practice of patching after
Heimersheim and Nanda (2024), "How to use and interpret activation patching".

Cost: with S = T = 12 steps the 144 cells restart at the patched step, all sources in one batch: 792
block applications per image (66 forwards; 936, or 78, for sites inside a step) against the 1728 of
144 forwards, and as many again for the null; 23 for whole states of one shared block. By default
1000 images of 32 px, a bViT of width 128: 56 s on one core (11 s measured on 200). Its ViT, a time
embedding, or CLS alone: 207 forwards per image; then 300 images are the default, 6 min at 6 ms per
forward.
ImageNet on a GPU, computed and not measured: 0.3 TFLOP per image of bViT-B, 7 TFLOP of ViT-B, at an
assumed 20 TFLOP/s 15 s and 6 min for 1000 images.

Expected: nothing in the paper. In one shared block a shift by one step should cost little. In a
stack, where each block may need what the block before it leaves, it should cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.patching import COLUMNS, Config
from bvit_interp.analyses.patching.corruption import corrupt
from bvit_interp.analyses.patching.patches import StepPatcher
from bvit_interp.analyses.patching.ratio import RatioOfMeans
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, at_most, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model

_RUNS = {
    "same": ("own", "own", "partner"),
    "other": ("own", "partner", "third"),
    "corrupted": ("corrupted", "own", "partner"),
}
"""Mode -> images of the receiver, of the donor, and of the donor of the null."""
_METRICS = ("recovered", "agreement")
_BYTES_OF_STATES = 2**26
_MOST_IMAGES = 300
"""Images by default where every cell is a run of its own: minutes on two cores at 32 px."""


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """The share that every cell recovers, in every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, in the models' classes; at least 2, for mode other 3.

    Returns
    -------
    A table of `COLUMNS`.
    """
    patchers = {
        name: {
            tokens: StepPatcher(model, config.site, tokens, config.unit, config.steps)
            for tokens in config.tokens
        }
        for name, model in models.items()
    }
    if not all(patcher.tied for each in patchers.values() for patcher in each.values()):
        config = at_most(config, data, _MOST_IMAGES, "each step patched into each step")
    partners = Partners(data, config.limit, config.skip_corrupt)
    _check_images(partners, data, config)
    tallies: dict[tuple[str, str, str], _Tally] = {
        (name, mode, tokens): _Tally(patchers[name][tokens])
        for name in models
        for mode in config.mode
        for tokens in config.tokens
    }

    def scores(batch: ModelBatch) -> dict[tuple[str, str], _Scores]:
        images = {"own": batch.images, "partner": batch.partner_images}
        if "other" in config.mode:
            third = _third_images(partners, batch.index, batch.geometry)
            images["third"] = third.to(batch.device)
        if "corrupted" in config.mode:
            grid = patchers[batch.model][config.tokens[0]].probe.grid
            images["corrupted"] = corrupt(
                batch.images, batch.index, grid, config.corruption, config.seed
            )
        own = patchers[batch.model]
        columns, done = sum(_columns(patcher, config.mode) for patcher in own.values()), 0

        def count_column() -> None:
            nonlocal done
            done += 1
            batch.advance(done / columns)

        found: dict[tuple[str, str], _Scores] = {}
        for tokens, patcher in own.items():
            by_mode = _scores(
                patcher, images, batch.labels, batch.partner_labels, config.mode, count_column
            )
            found |= {(mode, tokens): scores for mode, scores in by_mode.items()}
        return found

    for name, found in stream(
        models,
        data,
        config,
        scores,
        progress="patching",
        labels=True,
        partners=partners,
        images_at_once={name: _images_at_once(each) for name, each in patchers.items()},
    ):
        for (mode, tokens), of_batch in found.items():
            tallies[name, mode, tokens].update(of_batch)
    rows = []
    for (name, mode, tokens), tally in tallies.items():
        keys = {
            "model": name,
            "mode": mode,
            "site": config.site,
            "unit": config.unit,
            "tokens": tokens,
        }
        rows += [keys | row for row in tally.rows()]
    whole_numbers = {"unit": "Int64", "step_from": "Int64", "step_to": "Int64"}
    return pd.DataFrame(rows)[list(COLUMNS)].astype(whole_numbers)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The share recovered at five shifts: none, the smallest and a middle one in each direction."""
    shifts = frame[frame["step_from"].isna() & (frame["metric"] == "recovered")]
    sizes = sorted({abs(shift) for shift in shifts["shift"]} - {0})
    shown = {0, *sizes[:1], *sizes[len(sizes) // 2 :][:1]}
    kept = ["model", "mode", "tokens", "shift", "value", "low", "high", "null", "n", "skipped"]
    return shifts[shifts["shift"].abs().isin(shown)][kept]


def _check_images(partners: Partners, data: Samples, config: Config) -> None:
    if "other" not in config.mode:
        return
    if len(partners.index) < 3:
        raise UserError(
            "mode other needs at least 3 images, a pair and one for the null; got"
            f" {len(partners.index)}"
        )
    if len(data.classes) < 2:
        raise UserError("mode other needs images of two classes, the data have one; use mode same")


def _images_at_once(patchers: Mapping[str, StepPatcher]) -> int:
    """The most images whose states, of all sources, take at most 64 MiB."""
    patcher = next(iter(patchers.values()))
    numbers = len(patcher.steps) * patcher.num_tokens * patcher.view.embed_dim
    return _BYTES_OF_STATES // (4 * numbers)


def _third_images(partners: Partners, index: Tensor, geometry: Geometry) -> Tensor:
    """For each image, the partner of the image a quarter of the set further on.

    It is neither the image nor its partner.
    """
    count = len(partners.index)
    shifted = [
        partners.index[(partners.order[position] + max(1, count // 4)) % count]
        for position in index.tolist()
    ]
    return partners(torch.tensor(shifted), geometry)[0]


class _Scores(NamedTuple):
    """Scores of a batch in one mode; C cells and shifts."""

    gain: Tensor
    """``(n, metrics, 2, C)`` of the images that count; patched by the donor and by the null's."""
    whole: Tensor
    """``(n, metrics)``, the gain of the clean run."""
    levels: Tensor
    """``(B, 3)`` of all images: clean, baseline (nan if the image does not count), and whether it
    counts."""


def _scores(
    patcher: StepPatcher,
    images: Mapping[str, Tensor],
    labels: Tensor,
    partner_labels: Tensor,
    modes: Sequence[str],
    count_column: Callable[[], None],
) -> dict[str, _Scores]:
    """Scores of a batch in every mode; runs that two modes share are made once.

    `count_column` is called each time that a step is patched from all steps.
    """
    clean = {role: patcher.view(pixels) for role, pixels in images.items()}
    patched: dict[tuple[str, ...], Tensor] = {}
    scores = {}
    for mode in modes:
        receiver, *donors = _RUNS[mode]
        logits = []
        for key, donor in zip(_runs(patcher, mode), donors, strict=True):
            if key not in patched:
                patched[key] = patcher.logits(images[receiver], images[donor], count_column)
            logits.append(patched[key])
        scores[mode] = _mode_scores(
            mode,
            torch.stack(logits),
            clean[donors[0]],
            clean[receiver],
            labels,
            partner_labels,
            patcher.steps,
        )
    return scores


def _runs(patcher: StepPatcher, mode: str) -> list[tuple[str, ...]]:
    """Images that the patched runs of a mode depend on: receiver, if it matters, and donor."""
    receiver, *donors = _RUNS[mode]
    return [(donor,) if patcher.whole else (receiver, donor) for donor in donors]


def _columns(patcher: StepPatcher, modes: Sequence[str]) -> int:
    """The number of times that a step is patched from all steps; none where one run gives all."""
    if patcher.tied:
        return 0
    return len(patcher.steps) * len({run for mode in modes for run in _runs(patcher, mode)})


def _mode_scores(
    mode: str,
    patched: Tensor,
    donor: Tensor,
    receiver: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    steps: Sequence[int],
) -> _Scores:
    """Scores of one mode.

    Parameters
    ----------
    patched : logits ``(2, S, S, B, C)``, by the donor and by the null's.
    donor, receiver : logits ``(B, C)`` of the clean runs.
    labels, partner_labels : classes ``(B,)`` of the image and of its partner.
    """

    def difference(logits: Tensor) -> Tensor:
        logits = logits.double()
        own, partner = (
            logits.gather(-1, classes.expand(logits.shape[:-1])[..., None])[..., 0]
            for classes in (labels, partner_labels)
        )
        if mode == "other":
            return partner - own
        return own - (logits.sum(-1) - own) / (logits.shape[-1] - 1)

    clean = difference(donor)
    baseline = torch.zeros_like(clean) if mode == "same" else difference(receiver)
    agreement = (patched.argmax(-1) == donor.argmax(-1)).double()
    gain = torch.stack([difference(patched) - baseline, agreement])  # (metrics, 2, S, S, B)
    gain = _with_shifts(gain.flatten(2, 3).permute(3, 0, 1, 2), steps)
    whole = torch.stack([clean - baseline, torch.ones_like(clean)], dim=-1)
    counts = torch.ones_like(labels, dtype=torch.bool)
    if mode == "other":
        counts = labels != partner_labels
    levels = torch.stack([clean, baseline], dim=-1).masked_fill(~counts[:, None], torch.nan)
    levels = torch.cat([levels, counts.double()[:, None]], dim=-1)
    return _Scores(gain[counts], whole[counts], levels)


def _with_shifts(cells: Tensor, steps: Sequence[int]) -> Tensor:
    """Cells ``(..., S S)``, and behind them the mean over the cells of each shift."""
    shift = torch.tensor([t - s for s in steps for t in steps], device=cells.device)
    means = [cells[..., shift == each].mean(-1) for each in _shifts(steps)]
    return torch.cat([cells, torch.stack(means, dim=-1)], dim=-1)


def _shifts(steps: Sequence[int]) -> list[int]:
    """All differences t - s, in order."""
    return sorted({t - s for s in steps for t in steps})


class _Tally:
    """Streaming scores of one model, mode and token set."""

    def __init__(self, patcher: StepPatcher) -> None:
        self.steps, self.trained_steps = patcher.steps, patcher.probe.num_steps
        device = device_of(patcher.view)
        columns = len(self.steps) ** 2 + len(_shifts(self.steps))
        self.ratios = RatioOfMeans(len(_METRICS), 2, columns).to(device)
        self.levels = MeanCI(3).to(device)

    def update(self, scores: _Scores) -> None:
        """Add a batch."""
        self.ratios.update(scores.gain, scores.whole[:, :, None, None])
        self.levels.update(scores.levels)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of all cells, then of all shifts, by metric."""
        ratios, levels = self.ratios.compute(), self.levels.compute()
        count, images = int(ratios["n"]), int(levels["n"][2])
        if not count:
            raise UserError(
                f"mode other: each of the {images} images has the class of its partner; use other"
                " images or mode same"
            )
        clean, baseline, _ = levels["value"].tolist()
        columns: list[tuple[int | None, int | None, int]] = [
            (s, t, t - s) for s in self.steps for t in self.steps
        ]
        columns += [(None, None, shift) for shift in _shifts(self.steps)]
        for i, metric in enumerate(_METRICS):
            for j, (step_from, step_to, shift) in enumerate(columns):
                value, null = (
                    {key: float(ratios[key][i, donor, j]) for key in ("value", "low", "high")}
                    for donor in range(2)
                )
                if metric == "agreement":
                    for share in (value, null):
                        hits = share["value"] * count
                        share["low"], share["high"] = wilson_interval(hits, count)
                yield {
                    "metric": metric,
                    "step_from": step_from,
                    "step_to": step_to,
                    "shift": shift,
                    **value,
                    "null": null["value"],
                    "null_low": null["low"],
                    "null_high": null["high"],
                    "clean": clean if metric == "recovered" else None,
                    "baseline": baseline if metric == "recovered" else None,
                    "n": count,
                    "skipped": images - count,
                    "trained_steps": self.trained_steps,
                }
