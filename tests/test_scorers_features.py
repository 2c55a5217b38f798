"""Words and hashed n-grams of the linear scorer, against slow and obvious Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse.errors import InputError
from calibfuse.scorers.linear import FeatureConfig, NgramHasher
from calibfuse.scorers.plain_words import fold_characters, split_words

MASK = 0xFFFFFFFF


def words_of(*texts):
    """Words of each text; repeated bytes of one character may be folded, which leaves bytes that are no UTF-8."""
    stream = split_words(texts)
    return [
        [stream.word(i).decode(errors="surrogateescape") for i in range(len(stream)) if stream.text_index[i] == t]
        for t in range(len(texts))
    ]


def mixed(state, bits):
    """The finishing steps of the hash, on one Python integer."""
    state ^= state >> 15
    state = (state * 0x85EBCA6B) & MASK
    state ^= state >> 13
    state = (state * 0xC2B2AE35) & MASK
    return state >> (32 - bits)


def start(config, kind):
    return ((config.seed + 1) * 0x9E3779B1 + kind * 0x7FEB352D) & MASK


def slow_char_buckets(word, config):
    """Every n-gram of " word ", one at a time."""
    padded = b" " + word + b" "
    found = []
    for n in range(config.char_min, config.char_max + 1):
        for begin in range(len(padded) - n + 1):
            gram = padded[begin : begin + n]
            if gram == b" ":
                continue
            state = start(config, 2)
            for byte in gram:
                state = ((state ^ byte) * 0x01000193) & MASK
            found.append(mixed((state + n) & MASK, config.bucket_bits))
    return sorted(found)


def slow_word_state(word):
    state, power = 0, 1
    for place, byte in enumerate(word):
        if 0 < place < 64:
            power = (power * 0x01000193) & MASK
        state = (state + byte * power) & MASK
    return state


@pytest.mark.parametrize(
    "config",
    [
        FeatureConfig(),
        FeatureConfig(char_min=1, char_max=3, seed=5),
        FeatureConfig(bucket_bits=10, char_min=3, char_max=6),
    ],
    ids=["default", "single letters", "small"],
)
def test_hashes_equal_a_slow_loop(config):
    texts = ["A plain sentence, with a few words.", "", "x", "naïve 漢字 test " + "long" * 40]
    stream = split_words(texts)
    hasher = NgramHasher(config)
    owner = np.repeat(np.arange(len(stream)), stream.lengths + 1)
    found = [[] for _ in range(len(stream))]
    for buckets, exists in hasher.char_buckets(stream):
        for place in np.flatnonzero(exists):
            found[owner[place]].append(int(buckets[place]))
    words = [stream.word(i) for i in range(len(stream))]
    assert [sorted(each) for each in found] == [slow_char_buckets(word, config) for word in words]
    assert hasher.ngram_counts(stream).tolist() == [len(each) for each in found]
    states = [slow_word_state(word) for word in words]
    assert hasher.word_buckets(stream).tolist() == [mixed(s ^ start(config, 0), config.bucket_bits) for s in states]
    buckets, has_left = hasher.bigram_buckets(stream)
    for i in range(len(stream)):
        assert has_left[i] == (i > 0 and stream.text_index[i] == stream.text_index[i - 1])
        if has_left[i]:
            pair = (states[i - 1] * 0x27D4EB2F + states[i]) & MASK
            assert int(buckets[i]) == mixed(pair ^ start(config, 1), config.bucket_bits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, WORLD!", ["hello", "world"]),
        ("it's don't", ["its", "dont"]),
        ("'quoted' words", ["quoted", "words"]),
        ("sh1p tr@in ca$h b!g", ["ship", "train", "cash", "big"]),
        ("gla$$ and 1st of 2024", ["glass", "and", "1st", "of", "2024"]),
        ("soooo looong, good", ["so", "long", "good"]),
        ("d**n d*rn **bold** *it* q***", ["damn", "d*rn", "bold", "it", "q*"]),
        ("d@#n, D***ED cr*p; a*'es!", ["damn", "damned", "crap", "asses"]),
        ("d a r n it", ["darn", "it"]),
        ("w.o.w and a b", ["wow", "and", "a", "b"]),
        ("Café ＷＩＤＥ", ["cafe", "wide"]),
        ("sof\u00adt hy\u200bphen", ["soft", "hyphen"]),
        ("cyrillic \u0441\u0430t", ["cyrillic", "cat"]),
        ("  \n\t ", []),
        ("don\u2019t \u201cquote\u201d", ["dont", "quote"]),
        ("'ve seen it, we 'll", ["seen", "it", "we"]),  # contractions without their word
        ("\u2019s 'd", []),
        ("I've 'red 've3 ve", ["ive", "red", "ve3", "ve"]),
    ],
)
def test_plain_form_of_words(text, words):
    assert words_of(text) == [words]


def test_older_scorers_read_masked_words_as_before():
    stream = split_words(["d**n cr*p"], unmask=False)
    assert [stream.word(i) for i in range(len(stream))] == [b"d*n", b"cr*p"]


def test_disguises_do_not_run_across_texts():
    assert words_of("a", "b", "c") == [["a"], ["b"], ["c"]]
    assert words_of("so", "o", "", "end'", "'x") == [["so"], ["o"], [], ["end"], ["x"]]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5))
def test_a_batch_has_the_words_of_its_texts(texts):
    """Lone surrogates included: nothing a string can hold breaks the splitter."""
    assert words_of(*texts) == [words_of(text)[0] for text in texts]
    assert all(len(fold_characters(text)) == len(text) for text in texts)


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_words_stand_where_they_came_from(text):
    stream = split_words([text])
    raw = fold_characters(text).encode()
    places = stream.origin[stream.starts]
    assert (np.diff(places) > 0).all()
    assert all(0 <= place < len(raw) for place in places.tolist())


@pytest.mark.parametrize(
    "values",
    [{"bucket_bits": 3}, {"char_min": 0}, {"char_min": 4, "char_max": 2}, {"char_max": 9}, {"seed": -1}],
    ids=str,
)
def test_impossible_feature_settings_are_refused(values):
    with pytest.raises(InputError, match=r"must lie|need"):
        FeatureConfig(**values)
