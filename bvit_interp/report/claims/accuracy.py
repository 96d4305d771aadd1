"""Claims of bViT about accuracy, cost and early exits."""

from __future__ import annotations

from typing import Any

import timm
import torch

from bvit_interp.models.cost import flops, parameters
from bvit_interp.report.claims.claim import (
    Claim,
    Finding,
    Tables,
    interval,
    judged,
    number,
    numbers,
    recurrent,
    seed_of,
    stack_of,
    untested,
)

CLOSE = 0.05
"""Half of the lead of the stack at width 384 in Table 1."""
SAVED = 0.19
"""Share of the FLOPs that early exit saves in Table 5."""

_SMALL = "bvit_small_patch16_224"
_PRINTED = {
    ("bvit_small_patch16_224", 1, 12): (2.5, 8.5),
    ("bvit_base_patch16_224", 1, 12): (8.6, 33.7),
    ("bvit_large_patch16_224", 1, 24): (14.6, 119.3),
    ("vit_rms_small_patch16_224", 12, 12): (22.0, 8.5),
    ("vit_rms_base_patch16_224", 12, 12): (86.6, 33.7),
    ("vit_rms_large_patch16_224", 24, 24): (304.3, 119.3),
    (_SMALL, 2, 6): (4.3, 8.5),
    (_SMALL, 3, 4): (6.1, 8.5),
    (_SMALL, 4, 3): (7.9, 8.5),
    (_SMALL, 6, 2): (11.4, 8.5),
    ("bvit_base_fl_patch16_224", 1, 12): (8.6, 134.1),
    ("bvit_base_sc_patch16_224", 1, 12): (8.6, 33.7),
}
"""Model, distinct blocks, rounds -> parameters in millions and GFLOPs of Tables 1, 2 and 6."""


def _comes_close(tables: Tables) -> list[Finding]:
    findings = []
    for name in ("evaluate", "imagenette_s/evaluate"):
        table = tables(name)
        scores = table[table["bin"] == "all"].set_index("model")
        pairs = [(model, stack_of(model)) for model in recurrent(scores.index)]
        leads = [
            scores.loc[stack, "accuracy"] - scores.loc[model, "accuracy"] for model, stack in pairs
        ]
        said = "; ".join(
            f"{seed_of(model)} {interval(scores.loc[model], 'accuracy')} against the stack's"
            f" {interval(scores.loc[stack], 'accuracy')}, which leads by {number(lead, sign=True)}"
            for (model, stack), lead in zip(pairs, leads, strict=True)
        )
        said += (
            f"; chance {number(scores['chance'].iloc[0])},"
            f" {number(scores['n'].iloc[0], 0)} photographs"
        )
        verdict = judged(max(leads) < CLOSE) if len(pairs) > 1 else "not testable"
        findings.append(Finding(verdict, said, part=f"recipe of {pairs[0][0]}"))
    return findings


def _counts(_: Tables) -> list[Finding]:
    """Counted from shapes, without weights."""
    wrong, costs = [], 0
    for (name, blocks, rounds), (millions, gflops) in _PRINTED.items():
        arguments: dict[str, Any] = (
            {"num_blocks": blocks, "num_steps": rounds} if name == _SMALL else {}
        )
        with torch.device("meta"):
            model: Any = timm.create_model(name, **arguments)
        counted = parameters(model) / 1e6
        costs += round(flops(model, count_attention=False) / 1e9, 1) == gflops
        if round(counted, 1) != millions:
            wrong.append(f"{name} has {number(counted)} M, printed {millions} M")
    said = (
        f"{len(_PRINTED) - len(wrong)} of {len(_PRINTED)} counts of parameters and {costs} of"
        f" {len(_PRINTED)} GFLOPs are as printed; {'; '.join(wrong)}"
    )
    return [Finding(judged(len(wrong) < 2 and costs == len(_PRINTED)), said)]


def _peaks(tables: Tables) -> list[Finding]:
    table, findings = tables("step_accuracy"), []
    for model in recurrent(table["model"].unique()):
        steps = table[table["model"] == model].set_index("step")
        trained, last = int(steps["trained_steps"].iloc[0]), int(steps.index.max())
        at_t, best = steps.loc[trained], int(steps["accuracy"].idxmax())
        holds = (
            steps.loc[1, "accuracy"] < at_t["low"]
            and steps.loc[best, "accuracy"] <= at_t["high"]
            and steps.loc[last, "accuracy"] < at_t["low"]
        )
        said = (
            f"{number(steps.loc[1, 'accuracy'])} after step 1, {interval(at_t, 'accuracy')} after"
            f" T = {trained}, highest {number(steps.loc[best, 'accuracy'])} after step {best},"
            f" {interval(steps.loc[last], 'accuracy')} after step {last};"
            f" {number(at_t['n'], 0)} photographs"
        )
        findings.append(Finding(judged(bool(holds)), said, seed_of(model)))
    return findings


def _exits(tables: Tables) -> list[Finding]:
    table, findings = tables("early_exit"), []
    for model, part in table.groupby("model", sort=False):
        whole = part[part["table"] == "exit"].iloc[-1]
        curve = part[(part["table"] == "curve") & (part["saved_flops"] >= SAVED)]
        best = curve.loc[curve["accuracy"].idxmax()]
        said = (
            f"{number(best['accuracy'])} with {best['saved_flops']:.0%} of the FLOPs and"
            f" {best['saved_time']:.0%} of the time saved, the whole model"
            f" {interval(whole, 'accuracy')}, leaving at random {number(best['accuracy_null'])};"
            " the threshold is chosen on the same images"
        )
        findings.append(
            Finding(judged(best["accuracy"] >= whole["low"]), said, model, "accuracy is kept")
        )
        findings.append(
            Finding(
                "not testable" if best["accuracy_null"] >= whole["low"] else "held",
                f"leaving at random {number(best['accuracy_null'])}",
                model,
                "confidence matters",
            )
        )
    return findings


def _term(tables: Tables) -> list[Finding]:
    columns = ["auroc", "calibration_error"]
    both = [
        table[(table["table"] == "exit") & (table["exit"] < table["exit"].max())].set_index(
            ["model", "exit"]
        )[columns]
        for table in (tables("early_exit"), tables("ce/early_exit"))
    ]
    change = both[0] - both[1]
    said = "; ".join(
        f"{model}: AUROC of the exits {numbers(both[0].loc[model, 'auroc'])} with the term and"
        f" {numbers(both[1].loc[model, 'auroc'])} without"
        for model, _ in change.groupby(level="model", sort=False)
    )
    ends = [
        numbers((change[column].min(), change[column].max()), sign=True).replace(", ", " to ")
        for column in columns
    ]
    said += f". The AUROC changes by {ends[0]}, the calibration error by {ends[1]}"
    return [Finding(judged(bool((change["auroc"] > 0).all())), said)]


def _same_time(tables: Tables) -> list[Finding]:
    times = tables("base/cost").set_index("model")
    (ours, theirs) = (
        next(row for name, row in times.iterrows() if str(name).startswith(start))
        for start in ("bvit", "vit")
    )
    overlap = ours["latency_low"] <= theirs["latency_high"]
    said = ", its stack ".join(
        f"{number(row['latency_ms'], 0)} ms (quartiles {number(row['latency_low'], 0)} and"
        f" {number(row['latency_high'], 0)})"
        for row in (ours, theirs)
    )
    turns = number(ours["runs"], 0)
    return [Finding(judged(bool(overlap)), f"bViT-B {said}; {turns} runs in turn on a CPU")]


GRID = "no grid of trainings was run; it needs a GPU or days"

CLAIMS = (
    Claim(
        name="1",
        claim="a bViT comes close to the stack of blocks that was trained alike",
        paper="Table 1: bViT-B 0.779, ViT-B 0.789",
        rule="held if the stack's lead is below 0.05 (half of the paper's lead at width 384) in"
        " every seed; not testable with one seed",
        judge=_comes_close,
        tables=("evaluate", "imagenette_s/evaluate"),
        notebook="tab01_evaluate",
    ),
    Claim(
        name="2",
        claim="bViT-L comes close to ViT-L",
        paper="Table 1: 0.805 against 0.808",
        rule="as claim 1",
        judge=untested("no weights of that size"),
        command="bvit-interp train --recipe imagenet-paper --set model.name=bvit_large_patch16_224",
    ),
    Claim(
        name="3",
        claim="the narrow model falls behind its stack",
        paper="Table 1: 0.681 against 0.782 at width 384",
        rule="held if the stack's lead at the smallest width exceeds that at the largest by more"
        " than the deviation over seeds",
        judge=untested(GRID),
        command="bvit-interp study width --data cifar10:PATH",
        notebook="fig02_width",
    ),
    Claim(
        name="4",
        claim="width helps, more steps do not",
        paper="Fig. 2",
        rule="held if accuracy grows with every width and changes less than the deviation over"
        " seeds from 12 to 18 steps",
        judge=untested(GRID),
        command="bvit-interp study width --data cifar10:PATH",
        notebook="fig02_width",
    ),
    Claim(
        name="5",
        claim="more heads do not help",
        paper="section 4.1.2: 6 to 48 heads near 0.68",
        rule="held if no number of heads differs from the others by more than the deviation over"
        " seeds",
        judge=untested(GRID),
        command="bvit-interp study heads --data cifar10:PATH",
    ),
    Claim(
        name="6",
        claim="more distinct blocks at 12 applications help",
        paper="Table 2: 0.681, 0.729, 0.754, 0.764, 0.781, 0.782",
        rule="held if accuracy grows with the number of blocks",
        judge=untested(GRID),
        command="bvit-interp study blocks --data cifar10:PATH",
    ),
    Claim(
        name="7",
        claim="parameters and FLOPs are those of the tables",
        paper="Tables 1, 2 and 6",
        rule="held if all counts round to the printed ones but one: ViT-B as described cannot have"
        " the parameters that are printed",
        judge=_counts,
        command="bvit-interp cost --ckpt timm:bvit_base_patch16_224@random",
        notebook="tab06_cost",
    ),
    Claim(
        name="8",
        claim="time embedding and registers gain a little",
        paper="Table 3: 0.779, 0.780, 0.781",
        rule="held if the gain exceeds the deviation over seeds",
        judge=untested(
            "the models here were trained for half an epoch from the plain model's weights"
        ),
        command="bvit-interp train --recipe cifar10-te",
        notebook="tab01_evaluate",
    ),
    Claim(
        name="9",
        claim="accuracy is highest at T and falls after it",
        paper="Fig. 8: the peak is at step 12 of 24",
        rule="held if step 1 and the last step lie below the interval at T, and no step above it",
        judge=_peaks,
        tables=("step_accuracy",),
        notebook="fig08_step_accuracy",
    ),
    Claim(
        name="11",
        claim="early exit saves 19 % of the FLOPs and keeps the accuracy",
        paper="Table 5: 0.776 of 0.779",
        rule="held if the best threshold that saves 19 % keeps the accuracy within the whole"
        " model's interval; that confidence matters is not testable if leaving at random lies"
        " within it too",
        judge=_exits,
        tables=("early_exit",),
        notebook="tab05_early_exit",
    ),
    Claim(
        name="12",
        claim="the AUROC term separates the confidences of right and wrong answers",
        paper="Appendix B",
        rule="held if the AUROC of every exit of every model is higher with the term than with"
        " cross-entropy alone",
        judge=_term,
        tables=("early_exit", "ce/early_exit"),
        notebook="tab05_early_exit",
    ),
    Claim(
        name="13",
        claim="distillation helps",
        paper="Appendix C: 0.791",
        rule="held if the gain exceeds the deviation over seeds",
        judge=untested("no such training was run"),
        command="bvit-interp train --recipe imagenet-distilled",
    ),
    Claim(
        name="14",
        claim="fast latent and skip memory do not help",
        paper="Table 6: 0.757 and 0.693 against 0.762",
        rule="held if neither gains more than the deviation over seeds",
        judge=untested("no such training was run; the FLOPs are those of claim 7"),
        command="bvit-interp cost --ckpt timm:bvit_base_fl_patch16_224@random",
        notebook="tab06_cost",
    ),
    Claim(
        name="26",
        claim="a step costs the time of a block: a bViT is as fast as its stack",
        paper="Table 5: 7.36 ms and 7.52 ms",
        rule="held if the quartiles of the two times overlap",
        judge=_same_time,
        tables=("base/cost",),
        notebook="tab06_cost",
    ),
)
