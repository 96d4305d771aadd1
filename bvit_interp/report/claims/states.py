"""Claims about the state on its way through the steps."""

from __future__ import annotations

from bvit_interp.report.claims.claim import (
    Claim,
    Finding,
    Tables,
    Verdict,
    above,
    interval,
    judged,
    number,
    recurrent,
    stack_of,
)


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
        findings.append(Finding(above(own, stack["low"], stack["high"]), said, model))
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
        findings.append(
            Finding(above(middle, middle["null_low"], middle["null_high"]), said, model)
        )
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
        findings.append(
            Finding(
                above(tuned.loc[first], tuned.loc[first, "null"]),
                said,
                model,
                "the class is there after step 1",
            )
        )
        said = (
            f"after step {middle} {interval(tuned.loc[middle])} tuned, {interval(raw.loc[middle])}"
            f" raw; at the end {number(raw.loc[last, 'value'])}"
        )
        beyond = above(tuned.loc[middle], raw.loc[middle, "low"], raw.loc[middle, "high"])
        findings.append(Finding(beyond, said, model, "a tuned map reads more half way"))
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
        nearer = above(own.loc[1], own.loc[trained, "low"], own.loc[trained, "high"])
        findings.append(Finding(nearer, said, model))
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
        findings.append(Finding(above(own.loc["raw"], own.loc["raw", "null"]), said, model))
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
        decided = bool((own["high"] < 0).all() or (own["low"] > 0).any())
        verdict: Verdict = judged(bool((own["high"] < 0).all())) if decided else "not testable"
        findings.append(Finding(verdict, f"accuracy changes by {said}", model))
    return findings


CLAIMS = (
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
        name="schedule 1",
        claim="the number of steps matters: fewer or more than in training cost accuracy",
        rule="held if all changes of accuracy lie below 0; did not hold if one lies above",
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
