"""Words that a calibrator minds by themselves, in whatever tokens they are spelled."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse.calibrator import Calibrator, CalibratorConfig
from calibfuse.calibrator.word_bias import PROTECTED_PIECE, REACH, WordBias
from calibfuse.candidates import MIN_PROBABILITY
from calibfuse.errors import InputError
from calibfuse.fusion import FusionConfig, fuse
from calibfuse.prefix_cache import RowSession
from calibfuse.vocabulary import Vocabulary
from tests.tiny_calibrators import make_calibrator

# Above 0: names that are given something back, here so that they begin words of the other kind and end them.
WORDS = {"shit": -4.0, "ass": -2.0, "asshole": -3.0, "idiot": -2.5, "as": 0.6, "hol": 0.4, "hole": 1.0, "assho": 0.3}
WORDS |= {"shirtot": 0.2, "shirtless": 2.0}
WHOLE = {
    b" shit": -4.0,
    b" ass": -2.0,
    b" as": 0.6,
    b" shirt": PROTECTED_PIECE,
}  # a word, or on the way to one
TOKENS = [None, b" ", b"s", b" s", b"sh", b" sh", b"it", b" shit", b"Shit", b"shit.", b" shirt", b"irt", b"a", b" as"]
TOKENS += [b"ss", b" ass", b"hole", b"o", b"hol", b"e", b"idi", b"ot", b".", b"\n", b"i", b"t", b" The", "é".encode()]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.from_byte_strings(TOKENS, name="pieces")


@pytest.fixture(scope="module")
def words(vocabulary):
    return WordBias(WORDS, vocabulary)


def slow_after(vocabulary, token_ids):
    """Token -> shift by spelling: the letters that stand before, and the first letters of each token."""

    def letters_at_end(text):
        return text[len(text.rstrip(b"abcdefghijklmnopqrstuvwxyz")) :]

    text = b""
    for token in token_ids[-REACH:]:
        text = b" " if vocabulary.is_special[token] else text + vocabulary.token_bytes(token).lower()
    before = letters_at_end(text)
    if before == text and len(token_ids) >= REACH:
        return {}
    found = {}
    for token in range(len(vocabulary)):
        data = vocabulary.token_bytes(token).lower()
        run = data[: len(data) - len(data.lstrip(b"abcdefghijklmnopqrstuvwxyz"))]
        word = (before + run).decode()
        shift, begun = WORDS.get(word, 0.0), WORDS.get(before.decode(), 0.0)
        added = shift - begun if (shift < 0) == (begun < 0) else shift
        if word not in WORDS and len(word) >= 3:
            # on the way to a spared name
            shift = added = max(
                (min(s, PROTECTED_PIECE) for w, s in WORDS.items() if s > 0 and w.startswith(word)), default=0
            )
        if run and ((shift < 0 and added < -0.1) or (shift > 0 and added > 0.1)):
            found[token] = added
    return found


def as_dictionary(completions):
    if completions is None:
        return {}
    assert completions.token_ids.dtype == np.int64
    assert completions.shifts.dtype == np.float32
    return dict(zip(completions.token_ids.tolist(), completions.shifts.tolist(), strict=True))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=REACH + 2))
def test_completions_are_those_of_the_spelling(ids, vocabulary, words):
    # the fixtures do not change from one example to the next
    assert as_dictionary(words.after(ids[-REACH:])) == pytest.approx(slow_after(vocabulary, ids))


def test_words_in_pieces_are_found(vocabulary, words):
    def after(*tokens):
        return {TOKENS[i]: s for i, s in as_dictionary(words.after([TOKENS.index(t) for t in tokens])).items()}

    towards = {b"i": PROTECTED_PIECE, b"irt": PROTECTED_PIECE}  # "shirtless"
    assert after(b" sh") == pytest.approx({b"it": -4.0} | towards)
    assert after(b" shirt") == pytest.approx({b"ot": 0.2, b"o": 0.2})  # a word, and on the way to it
    assert after(b" s") == {}
    assert after(b" as", b"s") == pytest.approx({b"hole": -1.0})  # what "ass" has cost is not asked for again
    assert after(b" as", b"s", b"hol") == {b"e": -3.0}
    assert after(b" The") == {}
    assert after(b".")[b"Shit"] == -4.0
    assert after(b"\n")[b"shit."] == -4.0


def test_a_word_that_begins_out_of_sight_is_left_alone(words):
    s, sh = TOKENS.index(b"s"), TOKENS.index(b"sh")
    assert words.after([*[s] * (REACH - 1), sh]) is None
    assert words.after([TOKENS.index(b"."), sh]) is not None


def test_tokens_that_are_a_word(vocabulary, words):
    whole = as_dictionary(words.whole())
    assert {TOKENS[token]: shift for token, shift in whole.items()} == pytest.approx(WHOLE)
    always = [TOKENS[token] for token in words.token_ids]  # what is to be suppressed must be among the candidates
    assert always == [b" shit", b"Shit", b"shit.", b" ass"]


def test_special_and_unknown_ids_end_a_word(words):
    sh = TOKENS.index(b" sh")
    assert as_dictionary(words.after([sh, 0])) == as_dictionary(words.after([]))
    assert as_dictionary(words.after([sh, -1])) == as_dictionary(words.after([]))
    assert as_dictionary(words.after([sh, 10_000])) == as_dictionary(words.after([]))


@pytest.fixture(scope="module")
def pair(vocabulary):
    """The same calibrator without and with words, bound."""
    plain = make_calibrator(3, words={})
    minding = Calibrator(dataclasses.replace(plain.config, words=WORDS)).eval()
    minding.load_state_dict(plain.state_dict())
    return tuple(each.bind(vocabulary, use_disk_cache=False) for each in (plain, minding))


def test_only_the_calibrator_head_and_only_completing_tokens_move(pair, vocabulary):
    plain, minding = pair
    ids = torch.tensor([[TOKENS.index(t) for t in (b" The", b" sh", b"it", b".", b" as", b"s", b"hol")]])
    torch.testing.assert_close(plain.reference_log_probs(ids), minding.reference_log_probs(ids))
    before = plain.sequence(ids).log_scores("calibrator")
    after = minding.sequence(ids).log_scores("calibrator")
    whole = {TOKENS.index(token): shift for token, shift in WHOLE.items()}
    for place in range(ids.shape[1]):
        expected = whole | slow_after(vocabulary, ids[0, : place + 1].tolist())
        moved = (after - before)[0, place]
        wanted = torch.tensor([expected.get(token, 0.0) for token in range(len(vocabulary))])
        torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=1e-4)


def test_the_first_token_of_a_text_may_be_a_word(pair, vocabulary):
    plain, minding = pair
    moved = (minding.first_log_probs() - plain.first_log_probs()).exp()
    expected = {TOKENS.index(token): shift for token, shift in WHOLE.items()}
    expected |= slow_after(vocabulary, [])
    assert {TOKENS.index(b"Shit"), TOKENS.index(b"shit.")} < set(expected)
    wanted = torch.tensor([expected.get(token, 0.0) for token in range(1, len(vocabulary))]).exp()
    torch.testing.assert_close(moved[1:] / moved[1], wanted / wanted[0], atol=1e-4, rtol=1e-3)  # but for the normaliser


def test_asked_for_some_ids_it_says_the_same(pair):
    _, minding = pair
    torch.manual_seed(0)
    ids = torch.randint(0, len(TOKENS), (4, 9))
    said = minding.sequence(ids)
    wanted = torch.randint(0, len(TOKENS) + 3, (4, 9, 7))
    full = said.log_scores("calibrator")
    some = minding.sequence(ids).log_scores("calibrator", wanted)
    inside = wanted < len(TOKENS)
    torch.testing.assert_close(
        some[inside], full.gather(2, wanted.clamp(max=len(TOKENS) - 1))[inside], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(said.positions(2, 5).log_scores("calibrator"), full[:, 2:5])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0]])
def test_steps_say_what_the_whole_sequence_says(pair, order):
    """From an empty text, token by token, with rows reordered in between and a roll-back at the end."""
    _, minding = pair
    torch.manual_seed(1)
    ids = torch.randint(0, len(TOKENS), (3, 12))
    session = RowSession(minding)
    no_readings = torch.zeros(0)
    for length in itertools.chain(range(13), (9, 10)):
        if length == 6:
            ids = ids[order]
        said, _ = session.step(ids[:, :length], no_readings)
        if length:
            expected = minding.sequence(ids[:, :length]).positions(length - 1, length).log_scores("calibrator")[:, 0]
            torch.testing.assert_close(said.log_scores("calibrator"), expected, atol=1e-4, rtol=1e-4)


def test_readings_come_back_unchanged(pair):
    _, minding = pair
    session = RowSession(minding)
    ids = torch.randint(0, len(TOKENS), (2, 5))
    for length in (3, 4, 4, 5, 2):
        _, values = session.step(ids[:, :length], torch.tensor([1.5, -2.0, 7.0]))
        assert values == [1.5, -2.0, 7.0]


def test_their_tokens_are_candidates_however_improbable():
    """An unsure target gives each token less than a candidate needs; a word that is minded is moved all the same."""
    size = 40_000
    minded, other = 39_000, 39_001
    scores = torch.zeros(1, size)
    scores[0, :300] = 5.0
    scores[0, other + 1] = -torch.inf

    def guide_scores(head, token_ids):
        full = torch.zeros(1, size)
        full[0, minded] = -3.0 if head == "calibrator" else 0.0
        return full if token_ids is None else full.gather(1, token_ids)

    def covers(token_ids):
        return torch.ones_like(token_ids, dtype=torch.bool)

    config = FusionConfig(alpha=2.0, max_shift=4.0)
    before = scores.log_softmax(-1)
    assert before[0, minded] < math.log(MIN_PROBABILITY)
    always = torch.tensor([minded, other + 1])
    fused = fuse(scores, guide_scores, covers, config, always)
    assert float((fused - before)[0, minded]) == pytest.approx(-4.0, abs=0.01)
    assert float((fused - before)[0, other]) == 0.0
    assert float(fused[0, other + 1]) == -math.inf
    assert float(fused.double().exp().sum()) == pytest.approx(float(before.double().exp().sum()), abs=1e-6)
    alone = fuse(scores, guide_scores, covers, config)
    assert float((alone - before)[0, minded]) == 0.0


def test_ids_beyond_a_narrower_head_are_left_out(pair):
    plain, minding = pair
    ids = [i for i, t in enumerate(TOKENS) if t is not None and t.strip(b" .").lower() in (b"shit", b"ass")]
    assert minding.always_candidates(len(TOKENS)).tolist() == ids
    assert minding.always_candidates(ids[-1]).tolist() == ids[:-1]
    assert minding.always_candidates(ids[0]) is None
    assert plain.always_candidates(len(TOKENS)) is None


def test_words_change_the_cached_vectors(pair):
    plain, minding = pair
    assert plain.calibrator.fingerprint != minding.calibrator.fingerprint


@pytest.mark.parametrize("wrong", [{"Shit": -1.0}, {"a b": -1.0}, {"": -1.0}, {"shit": 0.0}, {"shit": float("inf")}])
def test_bad_words_are_refused(wrong):
    with pytest.raises(InputError, match="words must give lower-case words of a to z and finite numbers other than 0"):
        CalibratorConfig(words=wrong)
