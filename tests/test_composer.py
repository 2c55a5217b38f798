"""Hashed features of all tokens at once against one token at a time, and the composed vectors."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_calibrators import make_calibrator, make_vocabulary

from calibfuse.calibrator import binding
from calibfuse.calibrator.composer import Composer, TokenFeatures, token_features
from calibfuse.vocabulary import Vocabulary

ALPHABET = b"aZ09 \t\n.-_\x00\x7f\x80\xc3\xa9\xe4\xb8\xad\xf0\x9f\xff"
tokens = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.lists(st.sampled_from(list(ALPHABET)), max_size=24).map(bytes),
        st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from([b"", b" ", b"  ", b" the", b"The", b"THE", b"the", b"a" * 40]),
    ),
    max_size=12,
)


def features_of(strings, bucket_count=1 << 20):
    lengths = [len(token) for token in strings]
    offsets = np.zeros(len(strings) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return token_features(np.frombuffer(b"".join(strings), dtype=np.uint8), offsets, bucket_count)


def as_dictionary(features, index):
    part = slice(features.offsets[index], features.offsets[index + 1])
    summed = {}
    for bucket, weight in zip(features.buckets[part].tolist(), features.weights[part].tolist(), strict=True):
        summed[bucket] = summed.get(bucket, 0.0) + weight
    return summed


WHOLE_A, WHOLE_B, FOLDED, SHAPE, TRIGRAM, TETRAGRAM, SCRIPT = range(1, 8)
MULTIPLIER = {WHOLE_A: 0x9E3779B97F4A7C15, WHOLE_B: 0xC2B2AE3D27D4EB4F, FOLDED: 0x165667B19E3779F9}
MASK = (1 << 64) - 1


def slow_token_features(token, bucket_count):
    """The features of one token, written to be read: the oracle of `token_features`."""
    if not token:
        return {}

    def mix(value):
        value &= MASK
        value ^= value >> 30
        value = value * 0xBF58476D1CE4E5B9 & MASK
        value ^= value >> 27
        value = value * 0x94D049BB133111EB & MASK
        return value ^ (value >> 31)

    def string_hash(text, kind):
        total = sum((byte + 1) * pow(MULTIPLIER[kind], position, 1 << 64) for position, byte in enumerate(text))
        return mix(total * 8 + kind)

    bare = token[1:] if token[:1] == b" " and len(token) > 1 else token
    blanks = b" \t\n\v\f\r"
    kinds = [
        any(97 <= b <= 122 for b in token),
        any(65 <= b <= 90 for b in token),
        any(48 <= b <= 57 for b in token),
        any(b >= 128 for b in token),
        any(b in blanks for b in token),
        any(b < 128 and not chr(b).isalnum() and b not in blanks for b in token),
    ]
    after_space = token[1:] if token[:1] == b" " else token
    shape = sum(flag << bit for bit, flag in enumerate(kinds))
    shape |= (token[:1] == b" ") << 6 | (len(after_space) > 0 and 65 <= after_space[0] <= 90) << 7
    shape |= min(len(token), 15) << 8
    hashes = [
        string_hash(token, WHOLE_A),
        string_hash(token, WHOLE_B),
        string_hash(bytes(b + 32 if 65 <= b <= 90 else b for b in bare), FOLDED),
        mix(shape * 8 + SHAPE),
    ]
    marked = [256, *token, 257]
    grams = []
    for width, kind in ((3, TRIGRAM), (4, TETRAGRAM)):
        for start in range(len(marked) - width + 1):
            gram = kind
            for value in marked[start : start + width]:
                gram = gram * 259 + value
            grams.append(mix(gram))
    grams += [mix((a * 256 + b) * 8 + SCRIPT) for a, b in zip(token, token[1:], strict=False) if a >= 0xC0]
    features = {}
    for value in hashes:
        features[value % bucket_count] = features.get(value % bucket_count, 0.0) + 1.0
    for value in grams:
        features[value % bucket_count] = features.get(value % bucket_count, 0.0) + len(grams) ** -0.5
    return features


@settings(max_examples=300, deadline=None)
@given(strings=tokens, bucket_count=st.sampled_from([7, 1024, 32_768, 1 << 20]))
@example(strings=[], bucket_count=1024)
@example(strings=[b"", b""], bucket_count=1024)
@example(strings=[b"a"], bucket_count=1)
@example(strings=[bytes(range(256))], bucket_count=32_768)
def test_all_at_once_equals_one_by_one(strings, bucket_count):
    features = features_of(strings, bucket_count)
    assert len(features) == len(strings)
    for index, token in enumerate(strings):
        slow = slow_token_features(token, bucket_count)
        assert as_dictionary(features, index) == pytest.approx(slow, abs=1e-5)


def test_every_single_byte_and_pair_of_kinds():
    strings = [bytes([byte]) for byte in range(256)] + [bytes([32, byte]) for byte in range(256)]
    features = features_of(strings)
    for index, token in enumerate(strings):
        assert as_dictionary(features, index) == pytest.approx(slow_token_features(token, 1 << 20), abs=1e-5)


def test_a_token_has_the_same_features_in_every_vocabulary():
    alone = features_of([b" the"])
    among = features_of([b"x", b" the", b"", b" theory"])
    assert as_dictionary(alone, 0) == as_dictionary(among, 1)


def test_the_features_of_a_word():
    """4 whole-string features, 4 3-grams and 3 4-grams of ^ the$; a special token has none."""
    assert np.diff(features_of([b"", b" the"]).offsets).tolist() == [0, 11]


def test_case_and_leading_space_share_a_feature():
    forms = [set(slow_token_features(token, 1 << 30)) for token in (b"the", b" the", b"The", b" THE")]
    assert set.intersection(*forms), "the folded string is one feature of all of them"
    assert forms[0] != forms[1]


def test_different_strings_have_different_whole_string_features():
    strings = sorted({bytes(pair) for pair in np.random.default_rng(0).integers(0, 256, (20_000, 3)).astype(np.uint8)})
    features = features_of(strings, 1 << 30)
    # The first two features of a token are the whole string under two hashes.
    firsts = {(int(features.buckets[start]), int(features.buckets[start + 1])) for start in features.offsets[:-1]}
    assert len(firsts) == len(strings)


def test_features_are_a_fixed_format():
    """Checkpoints depend on the hashes: a change here makes every trained calibrator useless."""
    expected = [294, 4129, 7102, 9491, 21753, 25894, 26054, 31051, 31246, 31413, 31746]
    assert sorted(slow_token_features(b" the", 32_768)) == expected


@settings(max_examples=50, deadline=None)
@given(strings=tokens, data=st.data())
def test_taking_tokens_keeps_their_features(strings, data):
    features = features_of(strings)
    wanted = data.draw(st.lists(st.integers(0, len(strings) - 1), max_size=6)) if strings else []
    taken = features.take(np.array(wanted, dtype=np.int64))
    assert isinstance(taken, TokenFeatures)
    assert [as_dictionary(taken, i) for i in range(len(wanted))] == [as_dictionary(features, i) for i in wanted]


@pytest.fixture
def composer():
    torch.manual_seed(0)
    composer = Composer(bucket_count=512, token_width=12, hidden_width=20, head_count=2)
    with torch.no_grad():
        composer.table.normal_()
        composer.down.weight.normal_(std=0.3)
    return composer


def test_vectors_are_weighted_sums_of_rows_and_a_residual_mlp(composer):
    strings = [b" the", b"The", b"\xe4\xb8\xad"]
    vectors, biases = composer(features_of(strings, 512))
    for index, token in enumerate(strings):
        rows = sum(weight * composer.table[bucket] for bucket, weight in slow_token_features(token, 512).items())
        start, bias = rows[:12], rows[12:]
        normed = start / (start.square().mean() + 1e-6).sqrt() * composer.norm.weight
        hidden = torch.nn.functional.gelu(composer.up.weight @ normed + composer.up.bias)
        expected = start + composer.down.weight @ hidden + composer.down.bias
        torch.testing.assert_close(vectors[index], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(biases[index], bias, atol=1e-4, rtol=1e-4)


def test_long_vectors_are_shortened_and_others_stay(composer):
    features = features_of([b" the", b"The", b"\xe4\xb8\xad", b"-" * 112], 512)
    with torch.no_grad():
        plain, biases = composer(features)
    norms = plain.norm(dim=1)
    limit = float(norms.median()) + 1e-3
    composer.max_norm = limit
    vectors, same = composer(features)
    torch.testing.assert_close(same, biases)
    is_long = norms > limit
    assert is_long.any()
    assert not is_long.all()
    torch.testing.assert_close(vectors[~is_long], plain[~is_long])
    torch.testing.assert_close(vectors[is_long], plain[is_long] * (limit / norms[is_long])[:, None])


def test_equal_bytes_give_equal_vectors(composer):
    vectors, biases = composer(features_of([b"ab", b"x", b"ab"], 512))
    torch.testing.assert_close(vectors[0], vectors[2])
    torch.testing.assert_close(biases[0], biases[2])
    assert not torch.allclose(vectors[0], vectors[1])


def test_gradients_reach_table_and_mlp(composer):
    vectors, biases = composer(features_of([b"ab", b" x"], 512))
    (vectors.square().sum() + biases.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in composer.parameters())


def test_no_tokens_at_all(composer):
    vectors, biases = composer(features_of([], 512))
    assert vectors.shape == (0, 12)
    assert biases.shape == (0, 2)


def test_chunks_of_a_vocabulary_compose_like_the_whole(monkeypatch):
    calibrator, vocabulary = make_calibrator(), make_vocabulary(90)
    whole = binding.compose_vocabulary(calibrator, vocabulary, torch.float32)
    monkeypatch.setattr(binding, "_COMPOSE_CHUNK", 7)
    for a, b in zip(whole, binding.compose_vocabulary(calibrator, vocabulary, torch.float32), strict=True):
        torch.testing.assert_close(a, b)


def test_real_vocabulary_samples_equal_the_oracle(any_tokenizer):
    vocabulary = Vocabulary.from_tokenizer(any_tokenizer)
    features = token_features(vocabulary.data, vocabulary.offsets, 32_768)
    for token_id in range(0, len(vocabulary), 7):
        expected = slow_token_features(vocabulary.token_bytes(token_id), 32_768)
        assert as_dictionary(features, token_id) == pytest.approx(expected, abs=1e-5)
