"""Every rule that reads a table gives another verdict when the table says otherwise."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bvit_interp.errors import UserError
from bvit_interp.report.claims import OF_THE_PAPER, THROUGH_TIME, judge
from bvit_interp.report.claims.claim import Claim, Finding, overall, text, untested
from bvit_interp.results import read_table, write_table

ROOT = Path(__file__).parents[3]
FIGURES = ROOT / "figures"
CLAIMS = {claim.name: claim for claim in (*OF_THE_PAPER, *THROUGH_TIME)}
D128 = "bvit-imagenette-d128"


def where(table, /, **chosen):
    """Rows with these values."""
    rows = table.index == table.index
    for column, value in chosen.items():
        rows &= table[column] == value
    return rows


def stack_far_ahead(table):
    table.loc[where(table, model="vit-imagenette-d128-seed1", bin="all"), "accuracy"] += 0.1


def no_fall(table):
    last = where(table, model=D128, step=24)
    table.loc[last, "accuracy"] = table.loc[where(table, model=D128, step=12), "accuracy"].item()


def a_later_peak(table):
    table.loc[where(table, model=D128, step=20), "accuracy"] = 0.9


def exits_lose(table):
    table.loc[where(table, model=D128, table="curve"), "accuracy"] = 0.1


def random_exits_lose(table):
    table.loc[where(table, model=D128, table="curve"), "accuracy_null"] = 0.1


def the_term_helps(table):
    table["auroc"] += 0.01


def slower(table):
    table.loc[0, ["latency_ms", "latency_low", "latency_high"]] += 50


def at_rest(table):
    table.loc[where(table, model=D128, metric="period", tokens="cls"), "value"] = 1


def direction_at_rest(table):
    table.loc[where(table, model=D128, metric="direction_period", tokens="cls"), "value"] = 1


def low_rank(table):
    table.loc[where(table, model=D128, matrix="fc2"), "rank"] = 89


def low_early_blocks(table):
    early = where(table, model="vit-imagenette-d128") & table["step"].between(1, 4)
    table.loc[early & table["matrix"].isin(["fc1", "fc2"]), "rank"] = 50


def collapse(table):
    cut = where(table, model=D128, method="svd") & (table["rank"] < 96)
    table.loc[cut, "accuracy"] = 0.2


def rank_shrinks(table):
    table.loc[where(table, model=D128, matrix="cls", step=12), "rank"] = 1


def clear_trend(table):
    rows = where(table, model=D128)
    table.loc[rows, ["spearman_null_low", "spearman_null_high", "spearman_mean"]] = -0.2, 0.2, -0.9


def random_weights_gain_nothing(table):
    table.loc[where(table, model=D128, head="mean"), "untrained_gain_high"] = 0.01


def much_better_late(table):
    rows = where(table, model=D128, head="mean", step=10)
    table.loc[rows, ["gain", "gain_low", "gain_high"]] += 0.2


def roles_of_others(table):
    rows = where(table, model="bvit-imagenette", metric="step_correlation", head="mean")
    table.loc[rows, "null"] = 1.0


def classes_stay_mixed(table):
    table.loc[where(table, model=D128, step=12), "same_step_class_share_cls"] = 0.1


def no_stages_without_training(table):
    table.loc[table["model"].str.endswith("untrained"), "adjacent_step_share_cls"] = 0.1


@pytest.mark.parametrize(
    ("name", "table", "change", "of", "part", "before", "after"),
    [
        ("1", "evaluate", stack_far_ahead, "", f"recipe of {D128}", "held", "did not hold"),
        ("9", "step_accuracy", no_fall, "seed 0", "", "held", "did not hold"),
        ("9", "step_accuracy", a_later_peak, "seed 0", "", "held", "did not hold"),
        ("11", "early_exit", exits_lose, D128, "accuracy is kept", "held", "did not hold"),
        ("11", "early_exit", random_exits_lose, D128, "confidence matters", "not testable", "held"),
        ("12", "early_exit", the_term_helps, "", "", "did not hold", "held"),
        ("26", "base/cost", slower, "", "", "held", "did not hold"),
        ("10", "dynamics", at_rest, D128, "the state", "held", "did not hold"),
        (
            "10",
            "long/dynamics",
            direction_at_rest,
            D128,
            "its direction",
            "not testable",
            "did not hold",
        ),
        ("15", "energy_rank", low_rank, D128, "high rank", "held", "did not hold"),
        (
            "15",
            "energy_rank",
            low_early_blocks,
            "vit-imagenette-d128",
            "early blocks are lower",
            "did not hold",
            "held",
        ),
        ("16", "rank_sweep", collapse, D128, "collapses early", "did not hold", "held"),
        ("17", "energy_rank", rank_shrinks, D128, "", "held", "did not hold"),
        ("17", "centred/energy_rank", rank_shrinks, D128, "", "held", "did not hold"),
        ("18", "features", clear_trend, D128, "", "not testable", "held"),
        (
            "19",
            "pointing_game",
            random_weights_gain_nothing,
            D128,
            "finds the object",
            "not testable",
            "held",
        ),
        ("19", "pointing_game", much_better_late, D128, "late", "not testable", "held"),
        (
            "19",
            "pointing_game",
            much_better_late,
            D128,
            "lets go at the last step",
            "not testable",
            "held",
        ),
        ("19b", "attention", roles_of_others, "bvit-imagenette", "", "held", "did not hold"),
        (
            "25",
            "trajectories",
            classes_stay_mixed,
            D128,
            "classes separate",
            "held",
            "did not hold",
        ),
        (
            "25",
            "trajectories",
            no_stages_without_training,
            D128,
            "stages",
            "did not hold",
            "held",
        ),
    ],
)
def test_a_rule_follows_its_table(tmp_path, name, table, change, of, part, before, after):
    claim = CLAIMS[name]
    for used in claim.tables:
        (tmp_path / used).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FIGURES / f"{used}.csv", tmp_path / f"{used}.csv")

    def verdict():
        (found,) = (f for f in claim.findings(tmp_path) if (f.of, f.part) == (of, part))
        return found.verdict

    assert verdict() == before
    frame = read_table(tmp_path / f"{table}.csv")
    change(frame)
    write_table(frame, tmp_path / f"{table}.csv")
    assert verdict() == after


def first_bvit(table):
    return table["model"] == next(name for name in table["model"] if name.startswith("bvit"))


def lowered(column, by=10.0, **chosen):
    """Lower a column, and the interval with it, in these rows of the first bViT."""

    def change(table):
        rows = first_bvit(table) & where(table, **chosen)
        table.loc[rows, [column, "low", "high"]] -= by

    return change


def raised(column, **chosen):
    return lowered(column, by=-10.0, **chosen)


def beyond_chance(table):
    table.loc[first_bvit(table), "p_holm"] = 0.01


def late_steps_move_as_far(table):
    table.loc[first_bvit(table) & (table["step"] > 4), "norm_null"] = 1e3


@pytest.mark.parametrize(
    ("name", "part", "change", "before", "after"),
    [
        (
            "selectivity 1",
            "",
            lowered("value", metric="selective_share", step=12.0, site="mlp_post"),
            "held",
            "did not hold",
        ),
        (
            "selectivity 2",
            "",
            raised("value", metric="profile_change", site="mlp_post"),
            "held",
            "did not hold",
        ),
        (
            "selectivity 3",
            "",
            lowered("value", metric="window_r_corrected", site="mlp_post"),
            "held",
            "did not hold",
        ),
        ("ablation 1", "", beyond_chance, "not testable", "held"),
        ("ablation 2", "", late_steps_move_as_far, "did not hold", "held"),
        (
            "circuits 1",
            "",
            lowered("excess_low", condition="shuffled"),
            "held",
            "not testable",
        ),
        (
            "circuits 2",
            "rather than random ones",
            lowered("excess_low", condition="random"),
            "held",
            "not testable",
        ),
        ("patching 1", "", lowered("value", shift=1, tokens="all"), "held", "did not hold"),
        (
            "patching 2",
            "",
            lowered("value", step_from=6.0, step_to=6.0, mode="other"),
            "held",
            "did not hold",
        ),
        (
            "lens 1",
            "the class is there after step 1",
            lowered("value", lens="tuned", step=1.0),
            "held",
            "did not hold",
        ),
        (
            "lens 1",
            "a tuned map reads more half way",
            raised("value", lens="tuned", step=6.0),
            "not testable",
            "held",
        ),
        (
            "stability 1",
            "",
            lowered("value", metric="singular_value", step=12.0),
            "held",
            "did not hold",
        ),
        (
            "stability 2",
            "",
            raised("value", metric="direction_distance", step=12.0),
            "held",
            "did not hold",
        ),
        (
            "step-attribution 1",
            "",
            lowered("value", metric="share", step=1.0, layer="all"),
            "held",
            "did not hold",
        ),
        (
            "step-attribution 2",
            "better than magnitude",
            raised("value", metric="gain", method="stepwise", against="magnitude"),
            "not testable",
            "held",
        ),
        (
            "step-attribution 2",
            "better than magnitude",
            lowered("value", metric="gain", method="stepwise", against="magnitude"),
            "not testable",
            "did not hold",
        ),
        ("schedule 1", "", raised("value", variant="run", step=24.0), "held", "did not hold"),
        ("schedule 2", "", lowered("value", variant="raw"), "held", "did not hold"),
        ("schedule 3", "", lowered("value", variant="subspace"), "not testable", "held"),
    ],
)
def test_a_rule_of_ours_follows_its_table(tmp_path, name, part, change, before, after):
    claim = CLAIMS[name]
    (used,) = claim.tables
    frame = read_table(FIGURES / f"{used}.csv")
    model = next(name for name in frame["model"] if name.startswith("bvit"))

    def verdict():
        write_table(frame, tmp_path / f"{used}.csv")
        (found,) = (f for f in claim.findings(tmp_path) if (f.of, f.part) == (model, part))
        return found.verdict

    assert verdict() == before
    change(frame)
    assert verdict() == after


def test_counts_are_judged_by_the_code_itself(monkeypatch):
    """Another printed number makes the claim fail."""
    from bvit_interp.report.claims import accuracy, weights

    assert [f.verdict for name in ("7", "24") for f in CLAIMS[name].findings(FIGURES)] == [
        "held",
        "held",
    ]
    monkeypatch.setitem(accuracy._PRINTED, ("bvit_base_patch16_224", 1, 12), (8.7, 33.7))
    monkeypatch.setitem(weights._ADAPTERS, ("bvit_base_patch16_224", "te"), 9_217)
    for name in ("7", "24"):
        assert [f.verdict for f in CLAIMS[name].findings(FIGURES)] == ["did not hold"]


def test_all_claims_of_the_paper_are_there_once():
    numbers = [int(claim.name.rstrip("b")) for claim in OF_THE_PAPER]
    assert sorted(set(numbers)) == list(range(1, 27))
    assert len(CLAIMS) == len(OF_THE_PAPER) + len(THROUGH_TIME)
    for claim in CLAIMS.values():
        assert claim.tables or claim.command or claim.notebook
        notebook = ROOT / "notebooks" / f"{claim.notebook}.ipynb"
        assert not claim.notebook or notebook.is_file()


def test_the_notebook_of_a_claim_prints_its_verdict():
    """By the function that writes the page, so that the two cannot disagree."""
    for claim in CLAIMS.values():
        if claim.tables:
            cells = (ROOT / "notebooks" / f"{claim.notebook}.ipynb").read_text()
            assert "judge(" in cells and f'\\"{claim.name}\\"' in cells, claim.notebook


def test_a_verdict_in_words(tmp_path):
    findings = [Finding("held", "a is 1", "a", "x"), Finding("did not hold", "b is 2", "b", "x")]
    assert overall(findings) == "x: held in 1 of 2, did not hold in 1 of 2"
    assert overall([findings[0], Finding("held", "", "b", "y")]) == "x: held; y: held"
    assert overall([Finding("held", ""), Finding("held", "")]) == "held"
    claim = Claim(name="0", claim="c", rule="r", judge=untested("nobody knows"), paper="p")
    assert text(claim, tmp_path) == ("Claim 0: c\nPaper: p\nRule: r\nnot testable (nobody knows)")
    assert "Claim 9:" in judge("9", FIGURES)


def test_an_unknown_claim_and_a_missing_table_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no claim '99'; claims: 1, 2"):
        judge("99", FIGURES)
    with pytest.raises(UserError, match=r"claim 9 needs .*step_accuracy\.csv"):
        judge("9", tmp_path)


@pytest.mark.parametrize("page", ["reproduction", "through-time"])
def test_prose_around_the_verdicts_has_no_measured_number(page):
    """A number in prose is read from a table, or it is not there."""
    written = (ROOT / "docs" / f"{page}.md").read_text()
    prose = re.sub(r"<!-- claims.*<!-- end of claims -->", "", written, flags=re.DOTALL)
    assert len(prose) < len(written)
    prose = prose.replace("2605.10661", "").replace("86.6 M", "")  # an address, and the paper's
    assert not re.findall(r"\d\.\d", prose)
