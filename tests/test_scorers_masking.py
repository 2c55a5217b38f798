"""Masking of offending words on screen. The example words are the mildest that show the behaviour."""

import pytest

from calibfuse.errors import InputError
from calibfuse.scorers import load_scorer, mask_offensive


@pytest.fixture(scope="module")
def scorer():
    return load_scorer()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("What a load of bullshit!", "What a load of b******t!"),
        ("You bastard.", "You b*****d."),
        ("B a s t a r d", "B * * * * * d"),
        ("b@stards", "b******s"),
        ("Café bastard – naïve", "Café b*****d – naïve"),
    ],
)
def test_strong_words_are_masked(scorer, text, masked):
    assert mask_offensive(text, scorer) == masked


@pytest.mark.parametrize(
    "text",
    [
        "The gay couple and their Jewish, Muslim and black friends went to the museum.",
        "Scunthorpe, Sussex, cocktail, assassin, class, shiitake, sniggering",
        "",
        "   ",
        "1234 !!!",
    ],
)
def test_harmless_words_stay(scorer, text):
    assert mask_offensive(text, scorer) == text


def test_the_length_and_everything_else_stay(scorer):
    text = "ａ bastard,\n\tthe WORD 🙂 e\u0301 bastards"
    masked = mask_offensive(text, scorer)
    assert len(masked) == len(text)
    assert all(new in (old, "*") for new, old in zip(masked, text, strict=True))
    assert mask_offensive(masked, scorer) == masked


def test_threshold_decides(scorer):
    assert mask_offensive("a quiet day", scorer, threshold=0.0) == "a q***t d**"
    assert mask_offensive("you idiot", scorer, threshold=1.0) == "you idiot"
    with pytest.raises(InputError, match="threshold"):
        mask_offensive("a", scorer, threshold=1.5)
