"""Addresses go through text and come back; steps are counted once and for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvit_interp.errors import UserError, choices
from bvit_interp.vocabulary import (
    SITES,
    Address,
    axes_of,
    check_site,
    check_step,
    check_steps,
    place_of,
    unit_axis,
)

ANY_SITE = st.sampled_from(list(SITES)) | st.builds(
    "inner{}.{}".format, st.integers(1, 9999), st.sampled_from([*SITES])
)


@given(ANY_SITE, st.integers(-100, 10**6), st.none() | st.integers(0, 10**9))
def test_an_address_goes_through_text(site, step, unit):
    address = Address(site, step, unit)
    assert Address.parse(str(address)) == address
    assert Address.parse(f"  {address}\n") == address


def test_addresses_as_they_are_written():
    assert str(Address("mlp_post", 5, 1234)) == "mlp_post[5]:1234"
    assert str(Address("z", -1)) == "z[-1]"
    assert Address.parse("inner2.mlp_post[5]:1234") == Address("inner2.mlp_post", 5, 1234)
    assert Address.parse("z[5]:0") == Address("z", 5, 0)
    assert Address.parse("resid_post[0]") == Address("resid_post", 0, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "z",
        "z[]",
        "z[5",
        "z5]",
        "z[5]:",
        "z[5]:-1",
        "z[5]:a",
        "z[a]",
        "z[1.5]",
        "z[5][6]",
        "z [5]",
        "z[5] :3",
        "z[5]:3x",
        "z[--1]",
        "[5]",
        "z[5]\n:3",
        "a b[5]",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(
        UserError, match=r"not an address: .*; expected site\[step\] or site\[step\]:unit"
    ) as error:
        Address.parse(text)
    assert repr(text) in str(error.value)


@given(
    st.text(max_size=20)
    | st.from_regex(r"(z|q|mlp_post|mlp)\s?\[-?\d{1,9}\](:\d{1,9})?\s?", fullmatch=True)
)
def test_any_text_is_an_address_or_a_user_error(text):
    try:
        address = Address.parse(text)
    except UserError:
        return
    assert Address.parse(str(address)) == address


def test_an_unknown_site_is_refused_with_the_sites_there_are():
    for make in (
        lambda: Address("mlp", 1),
        lambda: Address.parse("mlp[1]"),
        lambda: check_site("mlp"),
    ):
        with pytest.raises(UserError, match="unknown site 'mlp'; sites: ") as error:
            make()
        assert str(error.value).endswith(", ".join(SITES))
    assert check_site("z") == "z"


@pytest.mark.parametrize(
    "site",
    [
        "inner.z",
        "inner0.z",
        "inner01.z",
        "inner-1.z",
        "inner1.inner2.z",
        "inner1.",
        "inner1",
        "outer1.z",
        ".z",
        "inner1z",
        "inner1.mlp",
        "inner99999.z",
        "inner\u0661.z",
    ],
)
def test_what_is_no_site_of_an_inner_update(site):
    with pytest.raises(UserError, match="unknown site"):
        check_site(site)


def test_the_place_of_a_site():
    assert place_of("z") == (0, "z")
    assert place_of("inner12.mlp_post") == (12, "mlp_post")
    assert axes_of("inner12.mlp_post") == axes_of("mlp_post") == ["B", "N", "F"]


def test_units_are_what_the_axes_say():
    named = {"H": ["q", "k", "v", "scores", "pattern", "z"], "F": ["mlp_pre", "mlp_post"]}
    for site in SITES:
        assert unit_axis(site) == next(
            (axis for axis, sites in named.items() if site in sites), "D"
        )
        assert unit_axis(f"inner3.{site}") == unit_axis(site)


@given(st.integers(1, 200), st.integers(-500, 500))
def test_a_step_counts_from_one_and_backwards_from_the_last(num_steps, step):
    python_list = list(range(1, num_steps + 1))
    if step in python_list:
        assert check_step(step, num_steps) == step
    elif -num_steps <= step < 0:
        assert check_step(step, num_steps) == python_list[step]
    else:
        with pytest.raises(
            UserError, match=rf"no step {step}; steps: 1\.\.{num_steps} \(-1 is the last\)"
        ):
            check_step(step, num_steps)


def test_step_zero_only_where_admitted():
    assert check_step(0, 12, zero=True) == 0
    assert check_step(-1, 12, zero=True) == 12
    assert check_step(-12, 12, zero=True) == 1
    with pytest.raises(UserError, match=r"no step 0; steps: 1\.\.12"):
        check_step(0, 12)
    with pytest.raises(UserError, match=r"no step 13; steps: 0\.\.12"):
        check_step(13, 12, zero=True)


@pytest.mark.parametrize("flag", [True, False])
def test_a_bool_is_no_step(flag):
    with pytest.raises(UserError, match=f"no step {flag}"):
        check_step(flag, 12, zero=True)
    with pytest.raises(UserError, match=f"no step {flag}"):
        check_steps([2, flag], 12)
    with pytest.raises(UserError, match=f"no step {flag}"):
        check_steps(flag, 12)


def test_steps():
    assert check_steps(None, 3) == [1, 2, 3]
    assert check_steps(2, 3) == [2]
    assert check_steps(-1, 3) == [3]
    assert check_steps([3, 1], 3) == [3, 1]
    assert check_steps(range(6, 13), 12) == [6, 7, 8, 9, 10, 11, 12]
    assert check_steps((s for s in (-1, 1)), 12) == [12, 1]


def test_steps_that_cannot_be():
    with pytest.raises(UserError, match=r"no step chosen; steps: 1\.\.12"):
        check_steps([], 12)
    with pytest.raises(UserError, match=r"a step is chosen twice in \[5, 5\]"):
        check_steps([5, 5], 12)
    with pytest.raises(UserError, match=r"a step is chosen twice in \[12, -1\]"):
        check_steps([12, -1], 12)
    with pytest.raises(UserError, match=r"no step 0; steps: 1\.\.12"):
        check_steps(range(3), 12)


def test_choices_are_cut():
    assert choices("abc") == "a, b, c"
    assert choices(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    assert choices(range(20), most=3) == "0, 1, 2, ... (20 in all)"
