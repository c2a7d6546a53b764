"""Settings that somebody sends are in their ranges, or refused in one sentence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_genmod.demo.settings import MOST_CHARACTERS, Setting, checked_values, from_query

STEPS = Setting("steps", "steps", 20, 1, 250)
SCALE = Setting("scale", "γ", 2.0, -5, 15)
KIND = Setting("kind", "class", "cat", choices=("cat", "dog", "<b>"))
PROMPT = Setting("prompt", "prompt", "an image")
ALL = [STEPS, SCALE, KIND, PROMPT]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    "setting, value, expected",
    [
        (STEPS, 7, 7), (STEPS, 7.0, 7), (STEPS, "7", 7), (STEPS, None, 20),
        (SCALE, "3.5", 3.5), (SCALE, -5, -5.0), (KIND, "<b>", "<b>"), (PROMPT, "", ""),
    ],
)  # fmt: skip
def test_values_that_fit(setting, value, expected):
    checked = setting.checked(value)
    assert checked == expected and type(checked) is type(expected)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        (STEPS, 0, "steps: 0 is not a whole number from 1 to 250"),
        (STEPS, 10**400, "steps: 1000000000000000000000000000000000000000... is not a whole number from 1 to 250"),
        (STEPS, 2.5, "steps: 2.5 is not a whole number from 1 to 250"),
        (STEPS, True, "steps: True is not a whole number from 1 to 250"),
        (STEPS, [7], "steps: a list is not a whole number from 1 to 250"),
        (SCALE, math.nan, "γ: nan is not a number from -5 to 15"),
        (SCALE, "inf", "γ: 'inf' is not a number from -5 to 15"),
        (KIND, "dgo", "class: 'dgo' is not there; did you mean dog?"),
        (KIND, 3, "class: 3 is not there; it is one of cat, dog, <b>"),
        (PROMPT, "x" * 501, "prompt: 501 characters; give up to 500"),
        (PROMPT, {"path": "/etc/passwd"}, "prompt: a dict is no text"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_sentence(setting, value, message):
    with pytest.raises(ValueError) as refused:
        setting.checked(value)
    assert str(refused.value) == message


@given(st.sampled_from(ALL), ANYTHING)
def test_whatever_is_sent_is_in_its_range_or_refused(setting, value):
    try:
        checked = setting.checked(value)
    except ValueError as error:
        assert len(str(error)) < 200 and "\n" not in str(error)
        return
    assert type(checked) is type(setting.default)
    if isinstance(checked, str):
        assert checked in setting.choices or (not setting.choices and len(checked) <= MOST_CHARACTERS)
    else:
        assert setting.low <= checked <= setting.high


@given(st.dictionaries(st.sampled_from(["steps", "scale", "kind", "prompt", "other"]), st.text()))
def test_a_url_gives_all_settings_and_names_what_does_not_fit(query):
    values, complaints = from_query(ALL, query)
    assert set(values) == {"steps", "scale", "kind", "prompt"}
    assert checked_values(ALL, values) == values
    unfit = [name for name in query if name != "other" and str(values[name]) != query[name] and _refused(name, query)]
    assert len(complaints) == len(unfit)


def _refused(name, query):
    try:
        {setting.name: setting for setting in ALL}[name].checked(query[name])
    except ValueError:
        return True
    return False
