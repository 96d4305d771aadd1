"""Claims about heads and neurons from step to step."""

from __future__ import annotations

from typing import Any

from bvit_interp.report.claims.claim import (
    Claim,
    Finding,
    Tables,
    above,
    interval,
    judged,
    number,
    recurrent,
    stack_of,
)

ALPHA = 0.05
OPEN = 0.6
"""Share of the gates that stay open where circuits are compared."""
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
        findings.append(Finding(above(last, first["low"], first["high"]), said, model))
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


def _keeps_it_for_long(tables: Tables) -> list[Finding]:
    table = _whole(tables("selectivity"), "window_r_corrected")
    findings = []
    for model in recurrent(table["model"].unique()):
        own, stack = (
            table[(table["model"] == name) & (table["step"] == 1)].set_index("window").sort_index()
            for name in (model, stack_of(model))
        )
        widest = own.index[-1]
        said = "; ".join(
            f"between steps 1 and {1 + window:.0f} r is {interval(own.loc[window], digits=2)}, of"
            f" another neuron {number(own.loc[window, 'null'], 2)}, in the stack"
            f" {number(stack.loc[window, 'value'], 2)}"
            for window in own.index
        )
        findings.append(
            Finding(above(own.loc[widest], max(own.loc[widest, "null"], 0)), said, model)
        )
    return findings


def _depends_on_the_step(tables: Tables) -> list[Finding]:
    table = tables("ablation")
    rows = table[
        (table["site"] == "z") & (table["method"] == "mean") & (table["metric"] == "log_kl")
    ].set_index(["model", "scope"])
    findings = []
    for model in rows.index.unique("model"):
        own = rows.loc[model]
        found, shares = own.loc["reliability_interaction"], own.loc["variance_interaction"]
        said = (
            f"what is left of log KL without the means of heads and of steps correlates"
            f" {number(found['value'], 2)} between halves of the images (p {found['p_holm']:.2g}"
            f" after Holm); its share of variance {interval(shares, digits=2)}, steps"
            f" {number(own.loc['variance_steps', 'value'], 2)}, heads"
            f" {number(own.loc['variance_units', 'value'], 2)}; {found['n']:.0f} images"
        )
        findings.append(
            Finding("held" if found["p_holm"] <= ALPHA else "not testable", said, model)
        )
    return findings


def _beyond_their_size(tables: Tables) -> list[Finding]:
    table = tables("ablation")
    rows = table[
        (table["site"] == "z")
        & (table["method"] == "mean")
        & (table["metric"] == "kl")
        & (table["scope"] == "each")
    ]
    findings = []
    for model in recurrent(rows["model"].unique()):
        own = rows[rows["model"] == model]
        third, last = int(own["step"].max()) // 3, int(own["step"].max())
        beyond = own["low"] > own["norm_null"]
        early, late = beyond[own["step"] <= third].mean(), beyond[own["step"] > last - third].mean()
        ratio = (own["value"] / own["norm_null"]).groupby(own["step"]).median()
        said = (
            f"KL lies above that of a random change of the same size for {early:.0%} of the heads"
            f" at steps 1 to {third}, for {late:.0%} at steps {last - third + 1} to {last}; the"
            f" median ratio is {number(ratio[1], 2)} at step 1 and {number(ratio[last], 2)} at step"
            f" {last}"
        )
        findings.append(Finding(judged(early > late), said, model))
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
        largest = others.loc[others["value"].idxmax()]
        verdict = above(own.iloc[0], largest["low"], others["high"].max())
        findings.append(Finding(verdict, said, model))
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


def _step_of_a_circuit(tables: Tables) -> list[Finding]:
    rows = _circuits(tables)
    findings = []
    for model in rows.index.unique("model"):
        whole, moved = rows.loc[model, "per-step"], rows.loc[model, "shuffled"]
        said = (
            f"KL {number(whole['kl'])}, with the circuit of another step at each step"
            f" {number(moved['excess'])} [{number(moved['excess_low'])},"
            f" {number(moved['excess_high'])}] more"
        )
        findings.append(
            Finding(
                above({"low": moved["excess_low"], "high": moved["excess_high"]}, 0), said, model
            )
        )
    return findings


def _units_of_a_circuit(tables: Tables) -> list[Finding]:
    rows, findings = _circuits(tables), []
    for model in recurrent(rows.index.unique("model")):
        for condition, part in (
            ("shuffled-units", "rather than those of another step"),
            ("random", "rather than random ones"),
        ):
            other = rows.loc[model, condition]
            said = (
                f"as many units per step, but others: KL {number(other['excess'])}"
                f" [{number(other['excess_low'])}, {number(other['excess_high'])}] more"
            )
            decided = other["excess_low"] > 0
            findings.append(Finding("held" if decided else "not testable", said, model, part))
    return findings


def _circuits(tables: Tables) -> Any:
    """Whole circuits by gradient with `OPEN` of the gates, by model and condition."""
    table = tables("circuits")
    return table[
        (table["site"] == "all")
        & (table["draw"] == "all")
        & (table["method"] == "gradient")
        & ((table["fraction"] - OPEN).abs() < 1e-9)
    ].set_index(["model", "condition"])


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
        name="selectivity 3",
        claim="a neuron of a bViT has part of its class profile of step 1 still at the last step",
        rule="held if the correlation over the widest window, corrected for noise, lies above that"
        " to another neuron and above 0",
        judge=_keeps_it_for_long,
        tables=("selectivity",),
        notebook="fig16_selectivity",
    ),
    Claim(
        name="ablation 1",
        claim="which head the answer needs depends on the step",
        rule="held if the interaction of head and step in log KL is the same in two halves of the"
        " images, p at most 0.05 after Holm's correction over all such tests of the model; else"
        " not testable",
        judge=_depends_on_the_step,
        tables=("ablation",),
        notebook="fig18_ablation",
    ),
    Claim(
        name="ablation 2",
        claim="heads at early steps matter more than the size of their change explains, and more"
        " often than at late steps",
        rule="held if more heads of the first third of the steps have a KL whose interval lies"
        " above that of a random change of the same size than of the last third",
        judge=_beyond_their_size,
        tables=("ablation",),
        notebook="fig18_ablation",
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
        name="circuits 1",
        claim="a step needs its own circuit",
        rule="held if the circuits of other steps add KL: the interval over draws and images lies"
        " above 0. In a shared block most of this may be how many units a step keeps",
        judge=_step_of_a_circuit,
        tables=("circuits",),
        notebook="fig23_circuits",
    ),
    Claim(
        name="circuits 2",
        claim="a step needs the units that its circuit keeps, and not only as many",
        rule="held if other units, as many per step, add KL beyond the interval; else not testable",
        judge=_units_of_a_circuit,
        tables=("circuits",),
        notebook="fig23_circuits",
    ),
)
