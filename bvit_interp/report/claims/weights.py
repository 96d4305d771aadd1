"""Claims of bViT about masks per step and transfer."""

from __future__ import annotations

from typing import Any

import timm
import torch

from bvit_interp.models.adapters import Adapted, Spec
from bvit_interp.report.claims.claim import (
    Claim,
    Finding,
    Tables,
    interval,
    judged,
    number,
    numbers,
)
from bvit_interp.vocabulary import AdapterMode

_ADAPTERS: dict[tuple[str, AdapterMode], int] = {
    ("bvit_base_patch16_224", "te"): 9_216,
    ("bvit_base_patch16_224", "lora-qv"): 25_344,
    ("bvit_base_patch16_224", "lora-ffn"): 62_208,
    ("bvit_base_patch16_224", "full"): 7_829_760,
    ("vit_rms_base_patch16_224", "lora-qv"): 295_680,
    ("vit_rms_base_patch16_224", "lora-ffn"): 738_048,
}
"""Model and mode -> trained parameters beside the head; printed as 9K, 25K, 62K, 7.8M, 296K,
738K in Table 4."""


def _pathways(tables: Tables) -> list[Finding]:
    last = _densest(tables)
    overall = last[last["layer"] == "all"].set_index("metric")
    overlap = last[(last["metric"] == "jaccard_mean") & (last["layer"] == "all")].iloc[0]
    used = last[(last["metric"] == "utilisation") & (last["layer"] == "all")].set_index("uses")
    accuracy, shuffled = overall.loc["accuracy"], overall.loc["shuffled"]
    said = (
        f"with {last['sparsity'].iloc[0]:.1%} of the masks pruned two steps' masks overlap by"
        f" {number(overlap['value'], 2)} (independent {number(overlap['null'], 2)});"
        f" {used['value'].iloc[-1]:.0%} of the active weights are used by all steps; accuracy"
        f" {interval(accuracy)}, with the masks in other orders {interval(shuffled)}. All grafts"
        " start from one trained block and may overlap for this reason alone: two grafts of the"
        " same step were not made"
    )
    return [Finding("not testable", said)]


def _specialised(tables: Tables) -> list[Finding]:
    last = _densest(tables)
    means = last[last["metric"] == "specialization"].groupby("layer")[["value", "null"]].mean()
    said = "; ".join(
        f"{layer} {number(means.loc[layer, 'value'], 4)} (independent masks"
        f" {number(means.loc[layer, 'null'], 4)})"
        for layer in ("qkv", "proj", "fc1", "fc2")
    )
    return [
        Finding(
            "not testable",
            f"mean share of a step's own weights: {said}. Grafts this short stay close to where"
            " they start",
        )
    ]


def _stays_accurate(tables: Tables) -> list[Finding]:
    table = tables("pathways")
    accuracy = table[table["metric"] == "accuracy"].sort_values("sparsity")
    said = (
        f"accuracy {numbers(accuracy['value'], 2)} at mask sparsities"
        f" {', '.join(f'{share:.0%}' for share in accuracy['sparsity'])}, random masks"
        f" {number(accuracy['null'].iloc[-1], 2)} at the last. Minutes of training lie between the"
        " prunings, and no sparsity is near 98 %"
    )
    return [Finding("not testable", said)]


def _densest(tables: Tables) -> Any:
    """The table of the round with the most pruned masks."""
    table = tables("pathways")
    return table[table["sparsity"] == table["sparsity"].max()]


def _transfers(tables: Tables) -> list[Finding]:
    table = tables("transfer/flowers12")
    parts = []
    for model, part in table.groupby("model", sort=False):
        trained = part[part["backbone"] == "trained"]
        probe = trained[trained["mode"] == "probe"]
        random = part[part["backbone"] == "random"]["accuracy"].mean()
        others = ", ".join(
            f"{run['mode']} {interval(run, 'accuracy', 2)}"
            for _, run in trained[trained["mode"] != "probe"].iterrows()
        )
        parts.append(
            f"{model}: probe {number(probe['accuracy'].mean())} (mean of {len(probe)} seeds,"
            f" deviation {number(probe['accuracy'].std())}), solved exactly"
            f" {number(probe['exact_accuracy'].mean())}, on random weights {number(random)}; one"
            f" seed each of {others}"
        )
    said = f"{'. '.join(parts)}. Chance {number(table['chance'].iloc[0])}"
    reason = "the two were not trained alike on CIFAR-10, and adapters have one seed each"
    return [Finding("not testable", f"{said}; {reason}")]


def _adapters(_: Tables) -> list[Finding]:
    """Counted from shapes, without weights."""
    counts = {}
    for name in dict.fromkeys(name for name, _ in _ADAPTERS):
        with torch.device("meta"):
            model: Any = timm.create_model(name)
            for of, mode in _ADAPTERS:
                if of == name:
                    counts[of, mode] = Adapted(model, Spec(mode=mode), ("0",)).count()
    said = ", ".join(f"{mode} of {name} {number(counts[name, mode], 0)}" for name, mode in counts)
    return [Finding(judged(counts == _ADAPTERS), said)]


CLAIMS = (
    Claim(
        name="20",
        claim="each step has a pathway of its own",
        paper="Fig. 5 and 14, Table 7",
        rule="held if grafts of different steps overlap less than two grafts of the same step; not"
        " testable without such retests",
        judge=_pathways,
        tables=("pathways",),
        notebook="fig05_pathways",
    ),
    Claim(
        name="21",
        claim="attention's projection is the most specialised, the FFN is shared",
        paper="section 4.2.3 and Appendix G.6",
        rule="held if the projection's own share exceeds its null by more than the others' do; not"
        " testable while no matrix exceeds its null",
        judge=_specialised,
        tables=("pathways",),
        notebook="fig05_pathways",
    ),
    Claim(
        name="22",
        claim="accuracy is stable up to 98 % sparsity",
        paper="Appendix G.6: above 0.85 after 13 rounds",
        rule="held if 0.95 of the best accuracy is kept at 98 %; not testable below that sparsity",
        judge=_stays_accurate,
        tables=("pathways",),
        notebook="fig14_pruning",
    ),
    Claim(
        name="23",
        claim="linear probes and adapters transfer as well as a ViT's",
        paper="Table 4",
        rule="held if no mode of the stack is better beyond seeds and images; not testable if the"
        " two were not trained alike",
        judge=_transfers,
        tables=("transfer/flowers12",),
        command="bvit-interp transfer --mode probe te lora-qv lora-ffn full --data folder:PATH"
        " --n-train 240 --random-baseline",
        notebook="tab04_transfer",
    ),
    Claim(
        name="24",
        claim="adapters have the printed numbers of parameters",
        paper="Table 4: 9K; 25K, 62K; 7.8M; 296K, 738K",
        rule="held if all six counts are those that the method gives",
        judge=_adapters,
        notebook="tab04_transfer",
    ),
)
