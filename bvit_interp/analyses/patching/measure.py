"""How far can a state be moved in time: what is kept when step t of a run is given the state of
step s?

Activation patching across the steps of a shared block; ours, not in bViT (arXiv 2605.10661). A site
of step s of run A (the whole state z_s, or one token set, head or neuron of any site) replaces that
of step t of run B, for all s and t. A row is one cell (s, t), or the mean of all cells of one shift
t - s, of a `statistic`:

- `recovered`: ``sum(patched - baseline) / sum(clean - baseline)`` over images, a ratio of means
  with a delta-method interval. `same`: A = B, one image, logit of the true class minus the mean of
  the others', baseline 0: what of the answer is kept under a shift in time. `other`: A another
  image; logit of A's class minus that of B's, clean in A, baseline in B; pairs of one class are
  skipped and counted. `corrupted`: B the image with its patches shuffled or with noise, clean in A,
  the image itself, scored as in `same`.
- `answer`: share of images that get the clean run's most likely class, with Wilson's interval (of a
  shift's mean share, for which it is too wide rather than too narrow).

`null` is the same patched from one more image, at the same steps: what any state of step s does at
step t. Each image is also the other of another (of an even number each pair comes both ways round),
so intervals of `other` may be too narrow by up to sqrt 2. For the whole state of one shared block
(no time embedding, no memory) cell (s, t) is ``F^(T-t)(z_s)``, the answer s - t steps past T: B
does not matter, cells of one shift are equal, and one longer run gives all. Whole states in a stack
do not read B either: `other` is then `same` on another scale. With a memory, a time embedding or
part of a state cells of a shift differ, and their mean depends on which s and t it has. Practice of
patching after Heimersheim and Nanda (2024), "How to use and interpret activation patching".

Cost: with S = T = 12 steps the 144 cells restart at the patched step, all sources in one batch: 792
block applications an image (66 forwards; 936, or 78, for sites inside a step) against the 1728 of
144 forwards, and the null as much again; 23 for whole states of one shared block. By default 1000
images of 32 px, a bViT of width 128: 56 s on one core (11 s measured on 200); its ViT, a time
embedding, or CLS alone: 207 forwards an image, 20 min at 6 ms a forward, so `--limit 100`. ImageNet
on a GPU, computed and not measured: 0.3 TFLOP an image of bViT-B, 7 TFLOP of ViT-B, at an assumed
20 TFLOP/s 15 s and 6 min for 1000 images. Expected: nothing in the paper. In one shared block a
shift by a step should cost little; in a stack, whose blocks may each want what the one before them
leaves, more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.patching import COLUMNS, Config
from bvit_interp.analyses.patching.patches import Patches, Recovered, corrupt
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.means import MeanCI

_RUNS = {
    "same": ("own", "own", "partner"),
    "other": ("own", "partner", "third"),
    "corrupted": ("corrupted", "own", "partner"),
}
"""Mode -> images of the run that is patched, of the run the patch is from, and of the null's."""


_STATISTICS = ("recovered", "answer")


_BYTES_OF_BATCH = 2**26


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """What every cell recovers, in every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes; at least 2, for the mode other 3.

    Returns
    -------
    A table of `COLUMNS`.
    """
    partners = Partners(data, config.limit, config.skip_corrupt)
    if "other" in config.mode and len(partners.places) < 3:
        raise UserError(
            f"the mode other takes three images, a pair and the null's; got {len(partners.places)}"
        )
    if "other" in config.mode and len(data.classes) < 2:
        raise UserError(
            "the mode other takes images of two classes, the data have one; take the mode same"
        )
    classes = {name: label_map(data, model) for name, model in models.items()}
    patches = {
        name: {
            tokens: Patches(model, config.site, tokens, config.unit, config.steps)
            for tokens in config.tokens
        }
        for name, model in models.items()
    }
    sums = {
        (name, mode, tokens): _sums(patches[name][tokens])
        for name in models
        for mode in config.mode
        for tokens in config.tokens
    }
    loader, geometries = config.loader(data, models, "patching")
    for batch in loader:
        for name, of_tokens in patches.items():

            def observe(part: Batch, name: str = name) -> dict[Any, list[Tensor]]:
                images = _images(
                    part, geometries[name], partners, patches[name][config.tokens[0]], config
                )
                return _observe(
                    patches[name],
                    {k: (x, classes[name][y]) for k, (x, y) in images.items()},
                    config,
                )

            for part in _parts(batch, of_tokens[config.tokens[0]]):
                for found in run_in_halves(observe, part):
                    for key, scores in found.items():
                        _update(*sums[(name, *key)], *scores)
    rows = []
    for (name, mode, tokens), of_cells in sums.items():
        about = {
            "model": name,
            "mode": mode,
            "site": config.site,
            "unit": config.unit,
            "tokens": tokens,
        }
        rows += [about | row for row in _rows(patches[name][tokens], *of_cells)]
    return pd.DataFrame(rows)[list(COLUMNS)].astype(
        {"unit": "Int64", "step_from": "Int64", "step_to": "Int64"}
    )


def _sums(patches: Patches) -> tuple[Recovered, MeanCI]:
    """Of every statistic, value and null, cell and shift; and means of clean, baseline and whether
    a pair counts."""
    device = next(patches.view.parameters()).device
    numbers = len(patches.steps) ** 2 + len(_shifts(patches.steps))
    return Recovered(len(_STATISTICS), 2, numbers).to(device), MeanCI(3).to(device)


def _parts(batch: Batch, patches: Patches) -> Iterator[Batch]:
    """The batch in parts whose states, of all sources at once, take at most 64 MiB."""
    numbers = len(patches.steps) * patches.count * patches.view.embed_dim
    if len(batch) > 1 and 4 * numbers * len(batch) > _BYTES_OF_BATCH:
        for half in batch.half():
            yield from _parts(half, patches)
    else:
        yield batch


def _images(
    batch: Batch, geometry: Any, partners: Partners, patches: Patches, config: Config
) -> dict[str, tuple[Tensor, Tensor]]:
    """The images ``(B, 3, H, W)`` of all runs, by their word in `_RUNS`, and their labels in the
    data ``(B,)``."""
    own = batch.views[geometry][0]
    found = {"own": (own, batch.labels), "partner": partners(batch.index, geometry)}
    if "other" in config.mode:
        # the partner of an image a quarter of them further on: neither the image nor its partner
        count = len(partners.places)
        further = [
            (partners.order[place] + max(1, count // 4)) % count for place in batch.index.tolist()
        ]
        found["third"] = partners(torch.tensor([partners.places[i] for i in further]), geometry)
    if "corrupted" in config.mode:
        corrupted = corrupt(own, batch.index, patches.probe.grid, config.corruption, config.seed)
        found["corrupted"] = (corrupted, batch.labels)
    device = next(patches.view.parameters()).device
    return {kind: (images.to(device), labels) for kind, (images, labels) in found.items()}


def _observe(
    patches: Mapping[str, Patches], images: Mapping[str, tuple[Tensor, Tensor]], config: Config
) -> dict[tuple[str, str], list[Tensor]]:
    """(mode, tokens) -> what `_update` adds, of a batch."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    with torch.inference_mode():
        for tokens, of_tokens in patches.items():
            clean = {kind: of_tokens.view(pixels) for kind, (pixels, _) in images.items()}
            patched: dict[tuple[str, ...], Tensor] = {}
            for mode in config.mode:
                receiver, donor, null = _RUNS[mode]
                logits = []
                for giver in (donor, null):
                    runs = (giver,) if of_tokens.whole else (receiver, giver)
                    if runs not in patched:
                        patched[runs] = of_tokens.logits(images[receiver][0], images[giver][0])
                    logits.append(patched[runs])
                own, others = (images[kind][1].to(logits[0].device) for kind in ("own", "partner"))
                found[mode, tokens] = _scores(
                    mode, torch.stack(logits), clean[donor], clean[receiver], own, others
                )
                found[mode, tokens][0] = _with_shifts(found[mode, tokens][0], of_tokens.steps)
    return found


def _scores(
    mode: str, patched: Tensor, donor: Tensor, receiver: Tensor, labels: Tensor, others: Tensor
) -> list[Tensor]:
    """Gained ``(B, statistic, 2, S S)`` and whole ``(B, statistic)`` of images that count, levels
    ``(B, 3)`` of all.

    Parameters
    ----------
    patched : logits ``(2, S, S, B, C)``, by the donor's states and by the null's.
    donor, receiver : logits ``(B, C)`` of the clean runs.
    labels, others : classes ``(B,)`` of the image and of its partner.
    """

    def difference(logits: Tensor) -> Tensor:
        logits = logits.double()
        own, other = (
            logits.gather(-1, c.expand(logits.shape[:-1])[..., None])[..., 0]
            for c in (labels, others)
        )
        if mode == "other":
            return other - own
        return own - (logits.sum(-1) - own) / (logits.shape[-1] - 1)

    clean = difference(donor)
    baseline = torch.zeros_like(clean) if mode == "same" else difference(receiver)
    same_answer = patched.argmax(-1) == donor.argmax(-1)
    gained = torch.stack(
        [difference(patched) - baseline, same_answer.double()]
    )  # (statistic, 2, S, S, B)
    whole = torch.stack([clean - baseline, torch.ones_like(clean)], dim=-1)
    counts = labels != others if mode == "other" else torch.ones_like(labels, dtype=torch.bool)
    levels = torch.stack([clean, baseline], dim=-1).masked_fill(~counts[:, None], torch.nan)
    levels = torch.cat([levels, counts.double()[:, None]], dim=-1)
    return [gained.flatten(2, 3).permute(3, 0, 1, 2)[counts], whole[counts], levels]


def _shifts(steps: list[int]) -> list[int]:
    """All t - s there are."""
    return sorted({t - s for s in steps for t in steps})


def _with_shifts(cells: Tensor, steps: list[int]) -> Tensor:
    """Cells ``(..., S S)`` with the means of those of every shift behind them."""
    shift = torch.tensor([t - s for s in steps for t in steps], device=cells.device)
    means = [cells[..., shift == each].mean(-1) for each in _shifts(steps)]
    return torch.cat([cells, torch.stack(means, dim=-1)], dim=-1)


def _update(
    recovered: Recovered, levels: MeanCI, gained: Tensor, whole: Tensor, level: Tensor
) -> None:
    recovered.update(gained, whole[:, :, None, None])
    levels.update(level)


def _rows(patches: Patches, recovered: Recovered, levels: MeanCI) -> Iterator[dict[str, Any]]:
    """Rows of all cells and shifts of one model, mode and tokens."""
    found, of_runs = recovered.compute(), levels.compute()
    count, images = int(found["n"]), int(of_runs["n"][2])
    if not count:
        raise UserError(
            f"mode other: each of the {images} images has the class of its partner; take others, or mode same"
        )
    clean, baseline, _ = of_runs["value"].tolist()
    steps = patches.steps
    places = [(s, t, t - s) for s in steps for t in steps] + [
        (None, None, shift) for shift in _shifts(steps)
    ]
    for i, statistic in enumerate(_STATISTICS):
        for j, (step_from, step_to, shift) in enumerate(places):
            value, null = (
                {key: float(found[key][i, k, j]) for key in ("value", "low", "high")}
                for k in (0, 1)
            )
            if statistic == "answer":
                for each in (value, null):
                    each["low"], each["high"] = wilson_interval(each["value"] * count, count)
            yield {
                "statistic": statistic,
                "step_from": step_from,
                "step_to": step_to,
                "shift": shift,
                **value,
                "null": null["value"],
                "null_low": null["low"],
                "null_high": null["high"],
                "clean": clean if statistic == "recovered" else None,
                "baseline": baseline if statistic == "recovered" else None,
                "n": count,
                "skipped": images - count,
                "trained_steps": patches.probe.num_steps,
            }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """What is recovered at five shifts: none, the least either way, and a middle one."""
    shifts = frame[frame["step_from"].isna() & (frame["statistic"] == "recovered")]
    sizes = sorted({abs(shift) for shift in shifts["shift"]} - {0})
    shown = {0, *sizes[:1], *sizes[len(sizes) // 2 :][:1]}
    kept = ["model", "mode", "tokens", "shift", "value", "low", "high", "null", "n", "skipped"]
    return shifts[shifts["shift"].abs().isin(shown)][kept]
