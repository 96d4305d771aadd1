"""Claims about what a head, a neuron or a state does from step to step. They are ours."""

from __future__ import annotations

from typing import Any

from bvit_interp.report.claims.claim import (
    Claim,
    Finding,
    Tables,
    interval,
    judged,
    number,
    recurrent,
    stack_of,
)

SPARSITY = 0.4
"""Share of the weights that are pruned where scores are compared."""


def _more_become_selective(tables: Tables) -> list[Finding]:
    table = _whole(tables("selectivity"), "selective_share")
    findings = []
    for model in table["model"].unique():
        steps = table[table["model"] == model].set_index("step")
        first, last = steps.iloc[0], steps.iloc[-1]
        said = (
            f"{interval(first, digits=2)} of the neurons after step 1, {interval(last, digits=2)}"
            f" after step {steps.index[-1]:.0f}; in random groups of images"
            f" {number(last['null'], 2)}"
        )
        findings.append(Finding(judged(last["low"] > first["high"]), said, model))
    return findings


def _keeps_its_profile(tables: Tables) -> list[Finding]:
    table = _whole(tables("selectivity"), "profile_change").set_index("model")
    findings = []
    for model in recurrent(table.index):
        own, stack = table.loc[model], table.loc[stack_of(model)]
        said = (
            f"1 - r of a neuron's class profile at successive steps {interval(own)}, of another"
            f" neuron's {number(own['null'])}; in the stack {interval(stack)}, of another neuron's"
            f" {number(stack['null'])}"
        )
        holds = own["high"] < min(own["null"], stack["low"]) and stack["high"] > stack["null"]
        findings.append(Finding(judged(holds), said, model))
    return findings


def _whole(table: Any, metric: str) -> Any:
    """Rows of a metric of neurons that stand for all units."""
    return table[(table["metric"] == metric) & table["unit"].isna() & (table["site"] == "mlp_post")]


def _bears_a_shift(tables: Tables) -> list[Finding]:
    table = tables("patching")
    rows = table[
        (table["metric"] == "recovered")
        & (table["mode"] == "same")
        & (table["tokens"] == "all")
        & (table["shift"] == 1)
        & table["step_from"].isna()
    ].set_index("model")
    findings = []
    for model in recurrent(rows.index):
        own, stack = rows.loc[model], rows.loc[stack_of(model)]
        said = (
            f"the whole state, put one step later, recovers {interval(own, digits=2)} of the logit"
            f" difference, in the stack {interval(stack, digits=2)}; another image's state"
            f" {number(own['null'], 2)} and {number(stack['null'], 2)}"
        )
        findings.append(Finding(judged(own["low"] > stack["high"]), said, model))
    return findings


def _cls_carries(tables: Tables) -> list[Finding]:
    table = tables("patching")
    rows = table[
        (table["metric"] == "recovered") & (table["mode"] == "other") & (table["tokens"] == "cls")
    ]
    findings = []
    for model in rows["model"].unique():
        own = rows[(rows["model"] == model) & (rows["step_from"] == rows["step_to"])]
        middle = own[own["step_to"] == own["trained_steps"] // 2].iloc[0]
        said = (
            f"another image's CLS at step {middle['step_to']:.0f} carries"
            f" {interval(middle, digits=2)} of its answer, a third image's"
            f" {number(middle['null'], 2)} [{number(middle['null_low'], 2)},"
            f" {number(middle['null_high'], 2)}]"
        )
        findings.append(Finding(judged(middle["low"] > middle["null_high"]), said, model))
    return findings


def _read_early(tables: Tables) -> list[Finding]:
    table = tables("lens")
    rows = table[(table["metric"] == "accuracy") & (table["tokens"] == "cls")]
    findings = []
    for model in rows["model"].unique():
        raw, tuned = (
            rows[(rows["model"] == model) & (rows["lens"] == lens)].set_index("step")
            for lens in ("raw", "tuned")
        )
        first, last = 1, int(raw.index.max())
        middle = last // 2
        said = (
            f"after step 1 the tuned lens is right for {interval(tuned.loc[first])}, the raw one"
            f" for {interval(raw.loc[first])}; most frequent class"
            f" {number(tuned.loc[first, 'null'])}"
        )
        above = tuned.loc[first, "low"] > tuned.loc[first, "null"]
        findings.append(Finding(judged(above), said, model, "the class is there after step 1"))
        said = (
            f"after step {middle} {interval(tuned.loc[middle])} tuned, {interval(raw.loc[middle])}"
            f" raw; at the end {number(raw.loc[last, 'value'])}"
        )
        beyond = tuned.loc[middle, "low"] > raw.loc[middle, "high"]
        findings.append(Finding(judged(beyond), said, model, "a tuned map reads more half way"))
    return findings


def _no_contraction(tables: Tables) -> list[Finding]:
    table = tables("stability")
    rows = table[(table["metric"] == "singular_value") & (table["index"] == 1)]
    findings = []
    for model in recurrent(rows["model"].unique()):
        own = rows[rows["model"] == model].set_index("step")
        trained = int(own["trained_steps"].iloc[0])
        said = ", ".join(
            f"{interval(own.loc[step], digits=2)} at step {step:.0f} (permuted weights"
            f" {number(own.loc[step, 'null'], 2)})"
            for step in (own.index.min(), trained, own.index.max())
        )
        holds = bool((own["low"] > 1).all())
        findings.append(Finding(judged(holds), f"largest singular value {said}", model))
    return findings


def _recovers(tables: Tables) -> list[Finding]:
    table = tables("stability")
    rows = table[
        (table["metric"] == "direction_distance")
        & (table["tokens"] == "cls")
        & (table["source"] == "random")
        & (table["start"] == 1)
        & (table["eps"] == 0.1)
    ]
    findings = []
    for model in rows["model"].unique():
        own = rows[rows["model"] == model].set_index("step")
        trained = int(own["trained_steps"].iloc[0])
        said = (
            f"moved by a tenth of the state after step 1 the direction of CLS is"
            f" {interval(own.loc[1])} away, {interval(own.loc[trained])} after step {trained}; the"
            f" run of another image {number(own.loc[trained, 'null'])}"
        )
        nearer = own.loc[trained, "high"] < own.loc[1, "low"]
        findings.append(Finding(judged(nearer), said, model))
    return findings


def _first_step_dominates(tables: Tables) -> list[Finding]:
    table = tables("step_attribution")
    rows = table[(table["metric"] == "share") & (table["layer"] == "all")]
    findings = []
    for model in rows["model"].unique():
        own = rows[rows["model"] == model].set_index("step")
        others = own.drop(index=own.index.min())
        said = (
            f"{interval(own.iloc[0], digits=2)} of the squared norm of the gradient at step 1,"
            f" {number(others['value'].max(), 2)} at the next largest, an equal share"
            f" {number(own.iloc[0]['null'], 3)}"
        )
        holds = own.iloc[0]["low"] > others["high"].max()
        findings.append(Finding(judged(holds), said, model))
    return findings


def _scores_per_step(tables: Tables) -> list[Finding]:
    table = tables("step_attribution")
    rows = table[
        (table["metric"] == "gain")
        & (table["method"] == "stepwise")
        & ((table["sparsity"] - SPARSITY).abs() < 1e-9)
    ].set_index(["model", "against"])
    findings = []
    for model in recurrent(rows.index.unique("model")):
        for other in ("magnitude", "taylor"):
            gain = rows.loc[model, other]
            said = f"accuracy gained {interval(gain)} at {SPARSITY:.0%} of the weights pruned"
            decided = gain["low"] > 0 or gain["high"] < 0
            part = f"better than {other}"
            findings.append(
                Finding(judged(gain["low"] > 0), said, model, part)
                if decided
                else Finding("not testable", said, model, part)
            )
    return findings


def _step_is_readable(tables: Tables) -> list[Finding]:
    table = tables("schedule")
    rows = table[
        (table["experiment"] == "decoding")
        & (table["metric"] == "accuracy")
        & (table["tokens"] == "cls")
        & table["step"].isna()
    ].set_index(["model", "variant"])
    findings = []
    for model in rows.index.unique("model"):
        own = rows.loc[model]
        said = (
            f"the step is read off a held-out CLS in {interval(own.loc['raw'], digits=2)} of the"
            f" cases, off its norm in {number(own.loc['norm', 'value'], 2)}, without the step"
            f" subspace in {number(own.loc['subspace', 'value'], 2)}; a guess"
            f" {number(own.loc['raw', 'null'], 3)}"
        )
        findings.append(
            Finding(judged(own.loc["raw", "low"] > own.loc["raw", "null"]), said, model)
        )
    return findings


def _needs_the_step(tables: Tables) -> list[Finding]:
    table = tables("schedule")
    rows = table[(table["experiment"] == "removal") & (table["metric"] == "log_prob_change")]
    findings = []
    for model in recurrent(rows["model"].unique()):
        own = rows[rows["model"] == model].set_index(["variant", "step"])
        without, random = own.loc["subspace"], own.loc["random_scaled"]
        worse = int((without["high"] < random["low"]).sum())
        said = (
            f"without the step subspace the log-probability is lower than after as large a random"
            f" change after {worse} of {len(without)} steps"
        )
        needed = worse > len(without) / 2
        findings.append(Finding("held" if needed else "not testable", said, model))
    return findings


def _how_many_steps(tables: Tables) -> list[Finding]:
    table = tables("schedule")
    rows = table[
        (table["experiment"] == "schedule")
        & (table["metric"] == "accuracy_change")
        & (table["variant"] == "run")
    ]
    findings = []
    for model in recurrent(rows["model"].unique()):
        own = rows[rows["model"] == model].set_index("step").sort_index()
        said = ", ".join(f"{interval(row)} with {step:.0f} steps" for step, row in own.iterrows())
        holds = bool((own["high"] < 0).all())
        findings.append(Finding(judged(holds), f"accuracy changes by {said}", model))
    return findings


CLAIMS = (
    Claim(
        name="selectivity 1",
        claim="more neurons are selective for classes at the last step than at the first",
        rule="held if the interval of the last step lies above that of the first",
        judge=_more_become_selective,
        tables=("selectivity",),
        notebook="fig16_selectivity",
    ),
    Claim(
        name="selectivity 2",
        claim="a neuron of a bViT keeps its class profile from one step to the next; in a stack,"
        " where it shares only its number, it does not",
        rule="held if the change of the bViT lies below that to another neuron and below the"
        " stack's, and the stack's is that to another neuron",
        judge=_keeps_its_profile,
        tables=("selectivity",),
        notebook="fig16_selectivity",
    ),
    Claim(
        name="patching 1",
        claim="a bViT bears its state one step later better than its stack does",
        rule="held if the recovered share of the bViT lies above the stack's, intervals apart. For"
        " whole states of a shared block this shift is a run with one step less",
        judge=_bears_a_shift,
        tables=("patching",),
        notebook="fig17_patching",
    ),
    Claim(
        name="patching 2",
        claim="half way, CLS alone carries part of the answer",
        rule="held if what another image's CLS carries lies above what a third image's does",
        judge=_cls_carries,
        tables=("patching",),
        notebook="fig17_patching",
    ),
    Claim(
        name="lens 1",
        claim="the class can be read off CLS after one step, and half way a tuned map reads more"
        " than the model's own head",
        rule="held if the tuned lens lies above the most frequent class after step 1; if it lies"
        " above the raw lens half way, intervals apart. A trained map reads what is there; that"
        " the model uses it is not shown",
        judge=_read_early,
        tables=("lens",),
        notebook="fig19_lens",
    ),
    Claim(
        name="stability 1",
        claim="no step of a bViT contracts its most stretched direction",
        rule="held if the largest singular value of the Jacobian lies above 1 at every step",
        judge=_no_contraction,
        tables=("stability",),
        notebook="fig20_stability",
    ),
    Claim(
        name="stability 2",
        claim="a run recovers from a small random change after step 1",
        rule="held if the direction of CLS is nearer to the clean run's after the last step than"
        " when it was moved",
        judge=_recovers,
        tables=("stability",),
        notebook="fig20_stability",
    ),
    Claim(
        name="step-attribution 1",
        claim="the first step has the largest share of the gradient",
        rule="held if its interval lies above those of all other steps. A stack that does so too"
        " says that it is no mark of recurrence; the norm grows with the state's change",
        judge=_first_step_dominates,
        tables=("step_attribution",),
        notebook="fig21_step_attribution",
    ),
    Claim(
        name="step-attribution 2",
        claim="a score that sums |w g| over the steps prunes better than magnitude and than"
        " |w sum g|",
        rule="held if the gain of accuracy lies above 0; not testable if its interval holds 0",
        judge=_scores_per_step,
        tables=("step_attribution",),
        notebook="fig21_step_attribution",
    ),
    Claim(
        name="schedule 1",
        claim="the number of steps matters: fewer or more than in training cost accuracy",
        rule="held if all changes of accuracy lie below 0",
        judge=_how_many_steps,
        tables=("schedule",),
        notebook="fig22_schedule",
    ),
    Claim(
        name="schedule 2",
        claim="the step can be read off the state",
        rule="held if a linear probe is right more often than a guess",
        judge=_step_is_readable,
        tables=("schedule",),
        notebook="fig22_schedule",
    ),
    Claim(
        name="schedule 3",
        claim="the model needs the step that can be read off its state",
        rule="held if at most steps the state without the step subspace is worse than after a"
        " random change of the same size, intervals apart; else not testable",
        judge=_needs_the_step,
        tables=("schedule",),
        notebook="fig22_schedule",
    ),
)
