"""The figures of several prompts as one row, by hand."""

import math

from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.diagnoses.verdicts import doubt
from ppl_lm.report.terminal import texts_title

ONE = {
    "kl": 1.0,
    "kl_se": 0.3,
    "khat": 0.2,
    "khat_se": 0.1,
    "seen": 90.0,
    "draws": 3,
    "all": 8,
    "exact": True,
    "word": "a",
}
TWO = {
    "kl": 2.0,
    "kl_se": 0.4,
    "khat": 0.9,
    "khat_se": 0.5,
    "seen": 20.0,
    "draws": 4,
    "all": 8,
    "exact": False,
    "word": "b",
}
HOW: dict = {"largest": ["khat"], "smallest": ["seen"], "total": ["draws"], "shared": ["all"]}


def test_each_figure_is_averaged_as_it_should():
    row = over_prompts([ONE, TWO], **HOW, without=["word"])
    assert row.pop("kl_se") == 0.25 and "word" not in row
    assert row == {"kl": 1.5, "khat": 0.9, "khat_se": 0.5, "seen": 20.0, "draws": 7, "all": 8, "exact": False}
    assert over_prompts([ONE, TWO])["word"] == "a"
    assert over_prompts([ONE], **HOW) == ONE and isinstance(over_prompts([ONE], **HOW)["draws"], int)


def test_what_a_prompt_lacks():
    """The largest of those that have one; no mean of what is not there; infinity stays."""
    none = TWO | {"khat": None, "khat_se": None, "kl": None, "kl_se": math.inf}
    row = over_prompts([ONE, none], **HOW)
    assert (row["khat"], row["khat_se"], row["kl"], row["kl_se"]) == (0.2, 0.1, None, math.inf)
    assert over_prompts([none], **HOW)["khat"] is None


def test_doubt_goes_by_what_was_judged():
    assert "worth 20 of the posterior's" in doubt({"seen": 20.0, "verdict": "unknown", "prompts": [{}]})
    assert doubt({"seen": 20.0, "prompts": [{}, {}]}).startswith("After one of the prompts")
    assert doubt({"seen": 30.0}) == doubt({"seen": None}) == ""
    draws = {"kind": "weighted", "seen": 0.4}  # a number of the user's own
    assert doubt(draws | {"verdict": "good"}) == "" and "not to be relied on" in doubt(
        draws | {"verdict": "unreliable"}
    )


def test_a_table_of_samples_says_after_which_prompt():
    assert texts_title([""]) == "samples" and texts_title(["The soup was"]) == "samples after 'The soup was'"
    chat = texts_title([[{"role": "user", "content": "Hi\x1b[31m"}], "b"])
    assert "Hi" in chat and "\x1b" not in chat and chat.endswith("the first of 2 prompts")
