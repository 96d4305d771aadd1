"""Claims of bViT about ranks, states, neurons and attention."""

from __future__ import annotations

from typing import Any

from bvit_interp.report.claims.claim import (
    Claim,
    Finding,
    Tables,
    Verdict,
    above,
    interval,
    judged,
    number,
    numbers,
    recurrent,
    stack_of,
)

HIGH_RANK = 0.7
"""Share of the full rank; the paper's 600 of 768 is 0.78."""
KEPT = 0.9
"""Share of the accuracy above chance that a truncated model has to keep."""
WIDE = 0.5
"""A null of rank correlations that reaches this far decides nothing."""


def _comes_to_rest(tables: Tables) -> list[Finding]:
    findings = []
    short, long = tables("dynamics"), tables("long/dynamics")
    for model in recurrent(short["model"].unique()):
        values = [
            table[(table["model"] == model) & (table["tokens"] == "cls")].set_index(
                ["metric", "step"]
            )["value"]
            for table in (short, long)
        ]
        ends = [int(each["norm"].index.max()) for each in values]
        trained = int(short.loc[short["model"] == model, "trained_steps"].iloc[0])
        moves = all(each["period", end] == 0 for each, end in zip(values, ends, strict=True))
        said = (
            f"norm {number(values[0]['norm', trained], 1)} after step {trained} and"
            f" {number(values[0]['norm', ends[0]], 1)} after step {ends[0]}; cosine of successive"
            f" updates there {number(values[0]['update_cosine', ends[0]], 4)}"
        )
        findings.append(Finding(judged(moves), said, model, "the state"))
        turns = [
            number(each["direction_change", step], 4)
            for each, step in ((values[0], trained), (values[0], ends[0]), (values[1], ends[1]))
        ]
        said = (
            f"the direction of CLS turns by {turns[0]} per step after step {trained}, {turns[1]}"
            f" after step {ends[0]} and {turns[2]} after step {ends[1]}: more and more slowly,"
            " and not at rest"
        )
        rests = values[1]["direction_period", ends[1]] == 1
        findings.append(
            Finding("did not hold" if rests else "not testable", said, model, "its direction")
        )
    return findings


def _high_rank(tables: Tables) -> list[Finding]:
    ranks = _ffn_ranks(tables)
    findings = []
    for model in recurrent(ranks["model"].unique()):
        first = ranks[(ranks["model"] == model) & (ranks["step"] == 1)]
        full, random = int(first["full_rank"].iloc[0]), int(first["random_rank"].iloc[0])
        said = f"{numbers(first['rank'], 0)} of {full} (fc1, fc2); random weights {random}"
        holds = bool((first["rank"] >= HIGH_RANK * full).all())
        findings.append(Finding(judged(holds), said, model, "high rank"))
    for model in recurrent(ranks["model"].unique()):
        of = ranks.pivot_table(index=["model", "step"], columns="matrix", values="rank")
        early, shared = of.loc[stack_of(model)].loc[1:4], of.loc[model].iloc[0]
        said = (
            f"fc1 of blocks 1 to 4 {numbers(early['fc1'], 0)}, fc2 {numbers(early['fc2'], 0)}; the"
            f" bViT {numbers(shared, 0)}"
        )
        holds = bool((early < shared).to_numpy().all())
        findings.append(Finding(judged(holds), said, stack_of(model), "early blocks are lower"))
    return findings


def _ffn_ranks(tables: Tables) -> Any:
    table = tables("energy_rank")
    return table[table["matrix"].isin(["fc1", "fc2"])]


def _collapses(tables: Tables) -> list[Finding]:
    table, findings = tables("rank_sweep"), []
    needs = {
        (model, method): _needed(part)
        for (model, method), part in table.groupby(["model", "method"], sort=False)
    }
    for model in recurrent(table["model"].unique()):
        svd = table[(table["model"] == model) & (table["method"] == "svd")].sort_values("rank")
        full, stack = int(svd["rank"].max()), stack_of(model)
        said = (
            f"nine tenths of the accuracy above chance need rank {needs[model, 'svd']} of {full}"
            f" (random directions {needs[model, 'random']}, those that inputs use"
            f" {needs[model, 'whitened']}); accuracy {numbers(svd['accuracy'], 2)} at ranks"
            f" {numbers(svd['rank'], 0)}, {number(svd['n'].iloc[0], 0)} images"
        )
        early = needs[model, "svd"] >= HIGH_RANK * full
        findings.append(Finding(judged(early), said, model, "collapses early"))
        said = f"rank {needs[stack, 'svd']} against the bViT's {needs[model, 'svd']}"
        lower = needs[stack, "svd"] < needs[model, "svd"]
        findings.append(Finding(judged(lower), said, stack, "tolerates lower ranks"))
    return findings


def _needed(part: Any) -> int:
    """The lowest rank from which `KEPT` of the accuracy above chance is kept."""
    part = part.sort_values("rank")
    above = part["accuracy"] - part["chance"]
    lost = part.loc[above < KEPT * above.iloc[-1], "rank"].max()  # nan if none loses as much
    return int(part.loc[~(part["rank"] <= lost), "rank"].iloc[0])


def _grows(tables: Tables) -> list[Finding]:
    plain, centred = (
        table[table["matrix"] == "cls"]
        for table in (tables("energy_rank"), tables("centred/energy_rank"))
    )
    findings = []
    for model in plain["model"].unique():
        ranks, shifted, share = (
            table[table["model"] == model].set_index("step")[column]
            for table, column in ((plain, "rank"), (centred, "rank"), (plain, "mean_share"))
        )
        last = int(ranks.index.max())
        at = [1, last // 2, last]
        said = (
            f"{numbers(ranks[at], 0)} after steps {at[0]}, {at[1]} and {at[2]}, centred"
            f" {numbers(shifted[at], 0)}; share of the mean {numbers(share[at], 2)}"
        )
        holds = bool(ranks[last] > ranks[1] and shifted[last] > shifted[1])
        peak = f", highest after step {int(ranks.idxmax())}"
        findings.append(Finding(judged(holds), said + peak, str(model)))
    return findings


def _texture_first(tables: Tables) -> list[Finding]:
    findings = []
    for model, part in tables("features").groupby("model", sort=False):
        first = part.iloc[0]
        low, high = first["spearman_null_low"], first["spearman_null_high"]
        decides = max(-low, high) <= WIDE
        said = (
            f"trend of the spectral centroid {number(first['spearman_mean'], 2, True)}, steps"
            f" shuffled {number(low, 2, True)} to {number(high, 2, True)};"
            f" {int(part['exceeds_real'].sum())} of {len(part)} pictures excite their neuron more"
            f" than the best of {number(first['n'], 0)} images do; {number(first['iterations'], 0)}"
            " iterations"
        )
        falls = bool(first["spearman_mean"] < low)
        findings.append(Finding(judged(falls) if decides else "not testable", said, str(model)))
    return findings


def _finds_the_object(tables: Tables) -> list[Finding]:
    table = tables("pointing_game")
    means, split = (
        table[table["head"] == head].set_index(["model", "step"]) for head in ("mean", "best-split")
    )
    findings = []
    for model in recurrent(means.index.unique("model")):
        own = means.loc[model]
        gain, width = own["gain"], (own["gain_high"] - own["gain_low"]) / 2
        peak, last = int(gain.idxmax()), int(gain.index.max())
        at = own.loc[peak]
        said = (
            f"at step {peak} the heads hit in {interval(at, 'hit_ratio')}, with other images' boxes"
            f" in {number(at['other_masks'])}: a gain of {number(at['gain'])}"
            f" [{number(at['gain_low'])}, {number(at['gain_high'])}], with random weights"
            f" {number(at['untrained_gain'])} [{number(at['untrained_gain_low'])},"
            f" {number(at['untrained_gain_high'])}]. The image's centre hits in"
            f" {number(at['centre_hit_ratio'])}, the brightest patch in"
            f" {number(at['luminance_hit_ratio'])}, that of most contrast in"
            f" {number(at['contrast_hit_ratio'])}; the best head (chosen on other images) in"
            f" {number(split.loc[model, 'hit_ratio'].max())} at most"
        )
        of_gain = {"low": at["gain_low"], "high": at["gain_high"]}
        null = max(0, at["untrained_gain_low"]), max(0, at["untrained_gain_high"])
        findings.append(Finding(above(of_gain, *null), said, model, "finds the object"))
        said = "gain " + ", ".join(
            f"{number(gain[step], sign=True)} +- {number(width[step])} at step {step}"
            for step in sorted({1, peak, last})
        )
        rises = gain[peak] - gain[1] > _both(width[peak], width[1])
        drops = gain[peak] - gain[last] > _both(width[peak], width[last])
        is_late: Verdict = "held" if rises else "not testable"
        if peak <= last / 2:
            is_late = "did not hold" if drops else "not testable"
        findings.append(Finding(is_late, said, model, "late"))
        leaves: Verdict = "held" if drops else "not testable"
        findings.append(Finding(leaves, said, model, "lets go at the last step"))
    reason = "no such model was trained on photographs"
    return [*findings, Finding("not testable", reason, part="registers do it best")]


def _both(one: float, other: float) -> float:
    """The half width of a difference of independent values."""
    return float((one**2 + other**2) ** 0.5)


def _stages(tables: Tables) -> list[Finding]:
    table = tables("trajectories")
    fresh = table[table["model"].str.endswith("untrained")]
    share, stage = "same_step_class_share_cls", "adjacent_step_share_cls"
    floor, flat = fresh[share].mean(), fresh[stage].mean()
    findings = []
    for model, part in table[~table["model"].str.endswith("untrained")].groupby("model"):
        last = int(part["step"].max())
        by_image = part.pivot_table(index="image", columns="step", values=share)
        gain = by_image[last] - by_image[1]
        half = 1.96 * gain.std() / len(gain) ** 0.5
        said = (
            f"own-class share of the neighbours of CLS at the same step"
            f" {number(by_image[1].mean(), 2)} after step"
            f" 1, {number(by_image[last].mean(), 2)} after step {last} (gain"
            f" {number(gain.mean(), 2)} +- {number(half, 2)}), untrained {number(floor, 2)}, labels"
            f" permuted {number(part['same_step_class_share_null'].mean(), 2)}; {len(gain)} images"
        )
        holds = gain.mean() > half and by_image[last].mean() > floor
        findings.append(Finding(judged(bool(holds)), said, model, "classes separate"))
        said = (
            f"share of neighbours at most one step away {number(part[stage].mean(), 2)}, untrained"
            f" {number(flat, 2)}, steps permuted"
            f" {number(part['adjacent_step_share_null'].mean(), 2)}"
        )
        findings.append(Finding(judged(part[stage].mean() > flat), said, model, "stages"))
    return findings


def _roles(tables: Tables) -> list[Finding]:
    table = tables("attention")
    table = table[table["head"] == "mean"]
    findings = []
    for model in recurrent(table["model"].unique()):
        own = table[table["model"] == model]
        pairs = own[own["metric"] == "step_correlation"]
        by_pair = pairs.set_index(["step", "other_step"])["value"]
        last = int(pairs["other_step"].max())
        kept = pairs["low"] > pairs[["null", "null_other_images"]].max(axis=1)
        entropy = own[own["metric"] == "normalised_entropy"].set_index("step")["value"]
        said = (
            f"a head's maps correlate {number(by_pair[1, last], 2)} between steps 1 and {last},"
            f" {number(by_pair[last - 1, last], 2)} between {last - 1} and {last}; beyond both"
            f" nulls at {kept.mean():.0%} of the pairs of steps; entropy / log N"
            f" {number(entropy[1], 2)} after step 1 and {number(entropy[last], 2)} after {last}"
        )
        changes = by_pair[1, last] < by_pair[last - 1, last]
        nulls = pairs[["null", "null_other_images"]].max(axis=1)
        fails = bool((pairs["high"] < nulls).any()) or not changes
        findings.append(
            Finding(judged(not fails) if fails or kept.all() else "not testable", said, model)
        )
    return findings


CLAIMS = (
    Claim(
        name="10",
        claim="the state does not come to a fixed point",
        paper="Appendix E.1, in words",
        rule="held if states that lie p steps apart at the end of the run differ by more than 1 %"
        " of the norm after T, for some lag p of every cycle; the block reads only the direction,"
        " for which the claim is not testable while it turns more and more slowly",
        judge=_comes_to_rest,
        tables=("dynamics", "long/dynamics"),
        notebook="fig15_dynamics",
    ),
    Claim(
        name="15",
        claim="the rank of a bViT's FFN is high; a ViT's is lower in early blocks",
        paper="Fig. 6: near 600 of 768",
        rule="high rank held if both matrices have 0.7 of the full rank or more; lower early"
        " blocks held if the first four blocks of the stack lie below its bViT in both matrices",
        judge=_high_rank,
        tables=("energy_rank",),
        notebook="fig06_energy_rank",
    ),
    Claim(
        name="16",
        claim="a bViT collapses when its FFN is truncated; a ViT tolerates lower ranks",
        paper="Fig. 7: below 600 of 768",
        rule="collapses early held if nine tenths of the accuracy above chance need 0.7 of the"
        " full rank; tolerates held if the stack needs a lower rank than its bViT",
        judge=_collapses,
        tables=("rank_sweep",),
        notebook="fig07_rank_sweep",
    ),
    Claim(
        name="17",
        claim="the rank of the CLS token grows with the steps",
        paper="Fig. 6",
        rule="held if the rank after the last step is above that after step 1, as it is and"
        " centred",
        judge=_grows,
        tables=("energy_rank", "centred/energy_rank"),
        notebook="fig06_energy_rank",
    ),
    Claim(
        name="18",
        claim="neurons go from texture to structure",
        paper="Fig. 3",
        rule="held if the trend of the spectral centroid lies below that of shuffled steps; not"
        " testable if shuffled steps reach 0.5",
        judge=_texture_first,
        tables=("features",),
        notebook="fig03_features",
    ),
    Claim(
        name="19",
        claim="attention finds the object, late, and lets go at the last step",
        paper="Fig. 4 and 10 to 13, in pictures",
        rule="the gain is the hit ratio less that with other images' boxes; finds held if its"
        " interval, at the step where it is largest, lies above 0 and above that of random weights;"
        " late held if that step is in the second half and gains more than step 1, beyond the"
        " intervals; lets go held if the last step gains less, beyond the intervals; not testable"
        " where intervals overlap",
        judge=_finds_the_object,
        tables=("pointing_game",),
        notebook="fig04_pointing_game",
    ),
    Claim(
        name="19b",
        claim="a head keeps its identity over the steps and changes its role",
        paper="Appendix F, in pictures",
        rule="held if at every pair of steps the maps of a head correlate beyond other heads and"
        " beyond other images, and less between the first and the last step than between the last"
        " two; not testable where an interval holds its null",
        judge=_roles,
        tables=("attention",),
        notebook="fig10_attention",
    ),
    Claim(
        name="25",
        claim="trajectories of CLS separate the classes and pass through stages",
        paper="Fig. 9, in a picture",
        rule="classes separate held if the own-class share of the ten nearest neighbours at the"
        " same step grows beyond its interval and ends above that of untrained weights; stages held"
        " if more neighbours are at most one step away than with untrained weights",
        judge=_stages,
        tables=("trajectories",),
        notebook="fig09_trajectories",
    ),
)
