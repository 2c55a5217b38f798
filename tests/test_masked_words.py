"""Masked and split spellings of minded words while a text grows, in real vocabularies and in small ones."""

import dataclasses
import os
from pathlib import Path

import pytest
import tokenizers
import torch

from calibfuse.calibrator import Calibrator
from calibfuse.calibrator.word_bias import REACH, WordBias
from calibfuse.prefix_cache import RowSession
from calibfuse.vocabulary import Vocabulary
from tests.tiny_calibrators import make_calibrator

WORDS = {"fuck": -6.0, "fucking": -6.0, "shit": -5.0, "bitch": -4.0, "asshole": -4.0, "damn": -3.0, "ass": -2.0}
WORDS |= {"bulls": -2.0, "cum": -4.0, "clown": -3.0, "douche": -2.0, "river": 0.5}
DISGUISED = {
    "f**k": "fuck",
    "f*cking": "fucking",
    "sh!t": "shit",
    "f u c k": "fuck",
    "fvck": "fuck",
    "F***ing": "fucking",
    "f*'ing": "fucking",
    "f--k": "fuck",
    "a**hole": "asshole",
    "d@mn": "damn",
    "sh1t": "shit",
    "s h i t": "shit",
}
INNOCENT = [
    "a*b and c*m, 2*n",
    "C** and C*, char **argv, x**k",
    "5! is 120, Sh! t",
    "U S A, I B M and D. C.",
    "s h e, I a m",
    "the **bold** and *emphasis*, **du**, As*",
    "don't, it's, l'ar, d'mn",
    "e-mail, T-shirt, self-made, X-ray",
    "He--he went, to do--he said",
    "0xb00b, 4dm1n, 2019, h5 and abc123",
    "M*A*S*H, R&B, AT&T",
    "$hit and f*** and fu**",
    "user@ss.org, cl.own, d_mn",
    "of u c k",
]
CHARACTERS = sorted({char for text in (*DISGUISED, *INNOCENT) for char in text})
TOKENS = [None, *(char.encode() for char in CHARACTERS)]
TOKENS += [b" " + char.encode() for char in CHARACTERS if char.isalpha()]
TOKENS += [b"**", b"***", b"ck", b"cking", b"ing", b"hole", b"it", b"!t", b"*ck", b" sh", b" f", b"--", b"*'", b"ass"]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.from_byte_strings(TOKENS, name="pieces")


@pytest.fixture(scope="module")
def words(vocabulary):
    return WordBias(WORDS, vocabulary)


def cut(text, tokens=TOKENS):
    """Longest tokens first."""
    ids, rest = [], text.encode()
    by_length = sorted((each for each in tokens if each), key=len, reverse=True)
    while rest:
        token = next(each for each in by_length if rest.startswith(each))
        ids.append(tokens.index(token))
        rest = rest[len(token) :]
    return ids


def given_to(words, ids):
    """What each token of a text is given by the words, those that are one token included."""
    whole = words.whole()
    shifts = []
    for place, token in enumerate(ids):
        after = words.after(ids[max(0, place - REACH) : place])
        found = [whole] if after is None else [whole, after]
        shifts.append(sum(float(each.shifts[each.token_ids == token].sum()) for each in found))
    return shifts


@pytest.mark.parametrize("text", DISGUISED)
@pytest.mark.parametrize("before", ["", "u ", "so, "])
def test_the_token_that_completes_a_disguised_word_gets_its_bias(text, before, words):
    assert sum(given_to(words, cut(before + text))) == pytest.approx(WORDS[DISGUISED[text]])


@pytest.mark.parametrize("text", INNOCENT)
def test_other_text_is_given_nothing(text, words):
    assert not any(given_to(words, cut(text)))
    assert not any(given_to(words, [TOKENS.index(char.encode()) for char in text]))


def test_signs_inside_a_token_count(words):
    sh, f = TOKENS.index(b" sh"), TOKENS.index(b" f")
    assert given_to(words, [sh, TOKENS.index(b"!t")]) == [0.0, -5.0]
    assert given_to(words, [f, TOKENS.index(b"*ck")]) == [0.0, -6.0]
    assert given_to(words, [f, TOKENS.index(b"*ck"), TOKENS.index(b"ing")])[-1] == 0.0  # "fuck" has cost it all


def test_what_begins_out_of_sight_is_left_alone(words):
    stars = [TOKENS.index(b"*")] * (REACH - 1)
    assert not any(given_to(words, [TOKENS.index(b"f"), *stars, TOKENS.index(b"k")]))
    spaced = cut("x x x f u c")
    assert given_to(words, [*spaced, TOKENS.index(b" k")])[-1] == -6.0


def test_words_without_disguise_are_given_as_before(vocabulary, words):
    assert given_to(words, cut("shit"))[-1] == -5.0
    ids = cut("f*")
    plain = words.after(cut("*"))
    found = words.after(ids)
    kept = dict(zip(found.token_ids.tolist(), found.shifts.tolist(), strict=True))
    assert len(kept) == len(found.token_ids)  # each token once
    for token, shift in zip(plain.token_ids.tolist(), plain.shifts.tolist(), strict=True):
        assert kept[token] <= shift


def test_steps_say_what_the_whole_sequence_says(vocabulary):
    """Cached decoding of disguised words, with a roll-back at the end."""
    plain = make_calibrator(3, words={})
    minding = Calibrator(dataclasses.replace(plain.config, words=WORDS)).eval()
    minding.load_state_dict(plain.state_dict())
    bound = minding.bind(vocabulary, use_disk_cache=False)
    texts = ["so, f**king", "b*tch, sh1t", "u f u c k  "]
    ids = torch.tensor([[TOKENS.index(char.encode()) for char in text] for text in texts])
    session = RowSession(bound)
    for length in (*range(1, ids.shape[1] + 1), 4, 5):
        said, _ = session.step(ids[:, :length], torch.zeros(0))
        expected = bound.sequence(ids[:, :length]).positions(length - 1, length).log_scores("calibrator")[:, 0]
        torch.testing.assert_close(said.log_scores("calibrator"), expected, atol=1e-4, rtol=1e-4)


FIVE = ["f**k", "f*cking", "sh!t", "f u c k", "fvck"]
REAL = ["gpt2.json", "phi-3-mini.json", "smollm2-135m", pytest.param("llama-3.json", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_read_disguised_words(name, shared_data):
    """The examples in sentences, where the word itself is spelled in whatever pieces; and what is innocent."""
    places = [shared_data / "tokenizers" / name, shared_data / "models" / name / "tokenizer.json"]
    if models := os.environ.get("CALIBFUSE_REAL_MODELS"):
        places.append(Path(models) / name / "tokenizer.json")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        pytest.skip(f"no {name}: name the folder of real models in CALIBFUSE_REAL_MODELS")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    words = WordBias(WORDS, Vocabulary.from_tokenizer(path))
    for text in FIVE:
        shifts = given_to(words, tokenizer.encode(f"You {text}", add_special_tokens=False).ids)
        assert sum(shifts) == pytest.approx(WORDS[DISGUISED[text]]), text
    for text in INNOCENT:
        assert not any(given_to(words, tokenizer.encode(text, add_special_tokens=False).ids)), text
