"""Masked spellings and the words they stand for, on mild words wherever these show the rule."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibfuse.vocabulary import spelling
from calibfuse.vocabulary.spelling import LETTERS_OF_SIGN, WordUnmasker

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


def masked_spellings(word, signs="*#-", separators=" .-_"):
    """The ways in which people mask a word of three letters and more, each once and never the word itself.

    Inner letters or all but the first hidden, letters as signs that look like them, "v" for "u", single letters.
    """
    if len(word) < 3 or not word.isalpha():
        return []
    hidden = [(start, stop) for start in range(1, len(word) - 1) for stop in range(start + 1, len(word))]
    if len(word) > 3:
        hidden.append((1, len(word)))
    found = [word[:start] + sign * (stop - start) + word[stop:] for sign in signs for start, stop in hidden]
    for place, letter in enumerate(word):
        if place:
            looks = [sign for sign, letters in LETTERS_OF_SIGN.items() if letter in letters]
            found += [word[:place] + sign + word[place + 1 :] for sign in [*looks, *("v" if letter == "u" else "")]]
    found += [separator.join(word) for separator in separators]
    return [each for each in dict.fromkeys(found) if each != word]


def test_the_maker_of_masked_spellings_makes_what_people_write():
    made = ["d a m n", "d***", "d**n", "d*mn", "d4mn", "d@mn", "da*n"]
    assert sorted(masked_spellings("damn", signs="*", separators=" ")) == made


def test_every_masked_spelling_is_read_back():
    words = ["damn", "darned", "crap", "bloody"]
    unmask = WordUnmasker(words)
    for word in words:
        made = masked_spellings(word)
        assert len(set(made)) == len(made) > 15
        assert {unmask(each) for each in made} == {word}


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(spelling).failed == 0
