"""Expressions of files: as Python's engine matches them, in a bounded time."""

import contextlib
import random
import re
import time

import pytest

from lora_kernels.patterns import Matcher

NAMES = [
    "", "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "a.b.c.7",
    "vision.layers.1.q_proj", "xq_proj", "aaaa", "abab.ab",
]  # fmt: skip
PATTERNS = [
    "q_proj", "layers.0.self_attn.q_proj", r"^model\.layers\.0\.self_attn\.q_proj$", "q_proj|c",
    r"^(?!.*vision).*\.(q|v)_proj", r".*\.(q_proj|up_proj)$", r".*layers\.(0|1[0-9])\..*",
    r"(?<=b\.)c\..", r"(?<!b)\.c.*", r"[^q]*q_proj", r"\w+(\.\w+)*?", r"(a|b|ab)*\.?[a-c]{2}",
    r"a{3,}", r".*\d+.*", r"\bq_proj\b", r"(?:(a*)*b?)*", "", ".*[\\d\\s].*", r"(a?){3}a{3}",
    r"model(?=\.layers).*", "a{0}", r"(?P<kind>\D+)", "(^a|b)+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_are_those_of_python_s_engine(pattern):
    matcher = Matcher()
    for name in NAMES:
        assert matcher.matches(pattern, name) == bool(re.fullmatch(pattern, name)), name
        expected = bool(re.match(rf"(.*\.)?({pattern})$", name))
        assert matcher.ends_with(pattern, name) == expected, name


def test_random_expressions():
    rng = random.Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", r"\b"])
        left, right = expression(depth - 1), expression(depth - 1)
        form = rng.choice(
            ["{0}{1}", "({0}|{1})", "(?:{0})*{1}", "({0})?{1}", "({0}){{1,3}}?{1}", "(?={0}){1}",
             "(?!{0}){1}"]
        )  # fmt: skip
        return form.format(left, right)

    for _ in range(400):
        pattern = expression(4)
        name = "".join(rng.choice("ab.") for _ in range(rng.randrange(8)))
        assert Matcher().matches(pattern, name) == bool(re.fullmatch(pattern, name)), (
            pattern, name
        )  # fmt: skip


@pytest.mark.parametrize("pattern", [
    "([a-z_]+)+!", "(a|a)*(a|a)*(a|aa)*!", "(.*)" * 20 + "!", "(?:(?=(.*))a|.)*!", "(a?){60}a{60}",
    "(a|a)" * 40 + "!", "(.*.*.*.*)*!", "(" * 30 + "a*" + "){0,60}" * 30,
])  # fmt: skip
def test_hostile_expressions_end(pattern):
    start, matcher = time.monotonic(), Matcher()
    with contextlib.suppress(ValueError):  # that it takes too long
        for _ in range(100):
            assert not matcher.ends_with(pattern, "a" * 50 + "q")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("pattern", "message"), [
    ("(", "no regular expression"), ("(a)\\1", "groupref within it"), ("(?i)a", "flags within it"),
    ("(?i:a)b*", "flags within it"), ("(" * 5000 + ")" * 5000, "nested too deeply"),
    ("a{99999999999}", "repetition"), ("a" * 300_000, "300000 characters"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Matcher().matches(pattern, "a")
