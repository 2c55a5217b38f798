"""Masked spellings and the words they stand for, on mild words wherever these show the rule."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibfuse.vocabulary import spelling
from calibfuse.vocabulary.spelling import WordUnmasker, masked_spellings

WORDS = ["damn", "darned", "fuck", "fucking", "shit", "bitch", "asshole"]


@pytest.mark.parametrize(
    ("masked", "word"),
    [
        ("f**k", "fuck"),
        ("f*cking", "fucking"),
        ("F***ing", "fucking"),
        ("f*'ing", "fucking"),
        ("sh!t", "shit"),
        ("f u c k", "fuck"),
        ("f.u.c.k", "fuck"),
        ("fvck", "fuck"),
        ("b*tch", "bitch"),
        ("a**hole", "asshole"),
        ("$hit", "shit"),
        ("f@ck", "fuck"),
        ("d***", "damn"),
        ("d*rned", "darned"),
    ],
)
def test_a_masked_word_is_read_as_the_word(masked, word):
    assert WordUnmasker(WORDS)(masked) == word


@pytest.mark.parametrize(
    "text", ["fuck", "duck", "f*n", "", "*", "***", "3", "a b", "b*ch", "d**", "vat", "don't", "e-mail", "f*"]
)
def test_what_hides_none_of_the_words_is_left(text):
    assert WordUnmasker(WORDS)(text) is None


@given(st.text(alphabet="dDfu*#@!(.'v\n\\4é", max_size=9))
def test_any_text_gives_a_word_or_nothing(text):
    assert WordUnmasker(WORDS)(text) in {None, *WORDS}


def test_every_masked_spelling_is_read_back():
    words = ["damn", "darned", "crap", "bloody"]
    unmask = WordUnmasker(words)
    for word in words:
        made = list(masked_spellings(word))
        assert len(set(made)) == len(made) > 15
        assert {unmask(each) for each in made} == {word}


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(spelling).failed == 0
