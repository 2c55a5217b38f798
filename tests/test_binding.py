"""A calibrator bound to a vocabulary: what it says, how it reads ids, and the disk cache."""

import dataclasses
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_calibrators import BOS, PAD, make_bound, make_calibrator, make_vocabulary

from calibfuse import guide as guide_module
from calibfuse.calibrator import Calibrator, binding, body
from calibfuse.calibrator import calibrator as calibrator_module
from calibfuse.calibrator.body import KeyValueRing
from calibfuse.calibrator.bound_files import cache_folder
from calibfuse.embedding.alignment import alignment_folders
from calibfuse.errors import InputError, MissingHeadError, VocabularyError, VocabularyMismatchError
from calibfuse.guide import SPECIAL_MASS
from calibfuse.prefix_cache import RowSession
from calibfuse.vocabulary import Vocabulary
from calibfuse.vocabulary import vocabulary as vocabulary_module

SIZE = 96


@pytest.fixture(scope="module")
def calibrator():
    return make_calibrator()


@pytest.fixture(scope="module")
def bound():
    return make_bound()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))


def random_ids(rows, length, seed=0, low=3):
    return torch.randint(low, SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


class TestLogProbs:
    """The distributions over the target's vocabulary."""

    @pytest.mark.parametrize("head", ["log_probs", "reference_log_probs"])
    def test_are_normalised_and_finite(self, bound, head):
        result = getattr(bound, head)(random_ids(2, 15))
        assert result.shape == (2, 15, SIZE)
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(2, 15), atol=1e-5, rtol=0)

    def test_special_tokens_share_their_mass(self, bound):
        special = bound.log_probs(random_ids(1, 5))[..., :3].exp()
        torch.testing.assert_close(special, torch.full((1, 5, 3), SPECIAL_MASS / 3))

    def test_heads_differ(self, bound):
        ids = random_ids(1, 5)
        assert (bound.log_probs(ids) - bound.reference_log_probs(ids)).abs().max() > 0.1

    def test_a_vocabulary_without_special_tokens(self, calibrator):
        bound = calibrator.bind(make_vocabulary(50, specials=0))
        assert bound.coverage == 1.0
        torch.testing.assert_close(
            bound.log_probs(random_ids(1, 4) % 50).logsumexp(-1), torch.zeros(1, 4), atol=1e-5, rtol=0
        )

    def test_chunked_over_positions_like_the_whole(self, bound, monkeypatch):
        ids = random_ids(2, 15)
        whole = bound.log_probs(ids)
        monkeypatch.setattr(guide_module, "_SEQUENCE_CHUNK", 1)
        torch.testing.assert_close(bound.log_probs(ids), whole)

    def test_only_the_past_matters(self, bound):
        ids = random_ids(1, 12)
        changed = ids.clone()
        changed[0, 8] = 3 + (changed[0, 8] - 2) % 90
        before, after = bound.log_probs(ids), bound.log_probs(changed)
        torch.testing.assert_close(before[:, :8], after[:, :8])
        assert not torch.allclose(before[:, 8], after[:, 8])

    def test_the_first_token_of_a_text(self, bound):
        first = bound.first_log_probs()
        assert first.shape == (SIZE,)
        assert not first.requires_grad
        # A begin mark is the same boundary as none at all.
        torch.testing.assert_close(first, bound.log_probs(torch.tensor([[BOS]]))[0, 0])
        assert not torch.allclose(first, bound.first_log_probs("reference"))

    def test_equal_bytes_get_equal_scores(self, calibrator):
        bound = calibrator.bind(Vocabulary.from_byte_strings([None, b" a", b"b", b" a", b"cd", b"b"]))
        result = bound.log_probs(torch.tensor([[1, 2, 4]]))
        torch.testing.assert_close(result[..., 1], result[..., 3])
        torch.testing.assert_close(result[..., 2], result[..., 5])
        torch.testing.assert_close(result, bound.log_probs(torch.tensor([[3, 5, 4]])))

    def test_ids_with_equal_bytes_share_the_mass_of_the_bytes(self, calibrator):
        strings = [None, b" a", b"b", b"cd"]
        single = calibrator.bind(Vocabulary.from_byte_strings(strings))
        double = calibrator.bind(Vocabulary.from_byte_strings([*strings, b" a", b"cd", b" a"]))
        ids = torch.tensor([[1, 2, 3, 1]])
        for ask in ("log_probs", "reference_log_probs"):
            expected, result = getattr(single, ask)(ids).exp(), getattr(double, ask)(ids).exp()
            torch.testing.assert_close(result[..., 1] + result[..., 4] + result[..., 6], expected[..., 1])
            torch.testing.assert_close(result[..., 3] + result[..., 5], expected[..., 3])
            torch.testing.assert_close(result[..., 2], expected[..., 2])
        differences = double.log_probs(ids) - double.reference_log_probs(ids)
        torch.testing.assert_close(differences[..., 1], differences[..., 6], atol=1e-5, rtol=1e-5)

    def test_an_id_that_is_never_made_gets_next_to_nothing(self, calibrator):
        plain = Vocabulary.from_byte_strings([None, b"a", b"b", b"a"])
        marked = dataclasses.replace(plain, is_fallback=np.array([False, False, False, True]))
        probabilities = calibrator.bind(marked).log_probs(torch.tensor([[1, 2]])).exp()
        alike = calibrator.bind(plain).log_probs(torch.tensor([[1, 2]])).exp()
        torch.testing.assert_close(probabilities[..., 3] / probabilities[..., 1], torch.full((1, 2), 1e-3 / 0.999))
        torch.testing.assert_close(probabilities[..., [1, 3]].sum(-1), alike[..., [1, 3]].sum(-1))

    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_random_vocabularies_permuted_and_doubled(self, calibrator, data):
        strings = data.draw(st.lists(st.binary(min_size=1, max_size=6), min_size=3, max_size=20, unique=True))
        twins = data.draw(st.lists(st.integers(0, len(strings) - 1), max_size=5))
        tokens = [None, *strings, *(strings[i] for i in twins)]
        order = np.array(data.draw(st.permutations(range(len(tokens)))))
        place = torch.from_numpy(np.argsort(order))
        ids = torch.tensor([data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=6))])
        whole = calibrator.bind(Vocabulary.from_byte_strings(tokens), use_disk_cache=False).log_probs(ids)
        permuted = calibrator.bind(
            Vocabulary.from_byte_strings([tokens[i] for i in order]), use_disk_cache=False
        ).log_probs(place[ids])
        torch.testing.assert_close(permuted[..., place], whole, atol=1e-4, rtol=1e-4)
        first = torch.tensor([tokens.index(token) for token in tokens])
        single = calibrator.bind(Vocabulary.from_byte_strings([None, *strings]), use_disk_cache=False)
        summed = torch.zeros(*ids.shape, len(strings) + 1).index_add_(-1, first, whole.exp())
        torch.testing.assert_close(summed, single.log_probs(first[ids]).exp(), atol=1e-4, rtol=1e-3)

    def test_permuted_ids_permute_the_scores(self, calibrator):
        vocabulary = make_vocabulary()
        order = np.random.default_rng(0).permutation(SIZE)
        tokens = [vocabulary.token_bytes(i) or None for i in range(SIZE)]
        permuted = Vocabulary.from_byte_strings([tokens[i] for i in order])
        place = torch.from_numpy(np.argsort(order))  # where each old id is now
        ids = random_ids(2, 10, low=0)
        expected = calibrator.bind(vocabulary).log_probs(ids)
        result = calibrator.bind(permuted).log_probs(place[ids])
        torch.testing.assert_close(result[..., place], expected, atol=1e-4, rtol=1e-4)

    def test_lower_precision_is_close(self):
        calibrator = make_calibrator(strength=0.3)  # log-probabilities spread over about 8 nats, as trained ones do
        full, half = calibrator.bind(make_vocabulary()), calibrator.bind(make_vocabulary(), dtype=torch.bfloat16)
        ids = random_ids(3, 20)
        assert half.memory_bytes < 0.75 * full.memory_bytes
        difference = (half.log_probs(ids) - full.log_probs(ids)).abs()
        assert difference.mean() < 0.01
        assert difference.max() < 0.1

    def test_missing_reference_head(self):
        bound = make_bound(heads=("calibrator",))
        with pytest.raises(
            MissingHeadError, match="needs the head 'reference', but the calibrator has only 'calibrator'"
        ):
            bound.reference_log_probs(random_ids(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_only_equal_the_full_head(calibrator, dtype, monkeypatch):
    monkeypatch.setattr(binding, "_SCORE_CHUNK", 17)
    bound = calibrator.bind(make_vocabulary(), dtype=dtype)
    said = bound.sequence(random_ids(2, 9))
    wanted = torch.randint(0, SIZE, (2, 9, 20), generator=torch.Generator().manual_seed(1))
    for head in bound.heads:
        full, some = said.log_scores(head), said.log_scores(head, wanted)
        torch.testing.assert_close(some, full.gather(-1, wanted), atol=1e-4, rtol=1e-4)
        other = wanted.flip(-1)
        torch.testing.assert_close(said.log_scores(head, other), some.flip(-1))
    torch.testing.assert_close(said.positions(2, 5).log_scores("calibrator", wanted[:, 2:5]), some_of(said, wanted))


def some_of(said, wanted):
    return said.log_scores("calibrator", wanted)[:, 2:5]


class TestPadding:
    """Left padding, begin marks and masks change nothing."""

    @pytest.mark.parametrize("pad", [PAD, BOS])
    @pytest.mark.parametrize("width", [1, 7, 40])
    def test_special_padding_needs_no_mask(self, bound, pad, width):
        ids = random_ids(2, 12)
        padded = torch.cat([torch.full((2, width), pad), ids], dim=1)
        torch.testing.assert_close(bound.log_probs(padded)[:, width:], bound.log_probs(ids), atol=1e-4, rtol=1e-4)

    def test_masked_padding_may_be_any_token(self, bound):
        ids = random_ids(2, 12)
        padded = torch.cat([torch.full((2, 5), 17), ids], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :5] = 0
        result = bound.log_probs(padded, mask)[:, 5:]
        torch.testing.assert_close(result, bound.log_probs(ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bound.log_probs(padded, mask.bool())[:, 5:], result)
        assert not torch.allclose(bound.log_probs(padded)[:, 5:], result)

    def test_rows_of_different_length(self, bound):
        ids = random_ids(3, 14)
        ids[1, :4], ids[2, :13] = PAD, PAD
        result = bound.log_probs(ids)
        for row, start in enumerate((0, 4, 13)):
            alone = bound.log_probs(ids[row : row + 1, start:])
            torch.testing.assert_close(result[row : row + 1, start:], alone, atol=1e-4, rtol=1e-4)

    def test_a_special_token_inside_the_text_is_a_boundary_that_is_seen(self, bound):
        ids = random_ids(1, 6)
        with_mark = torch.cat([ids[:, :3], torch.tensor([[BOS]]), ids[:, 3:]], dim=1)
        assert not torch.allclose(bound.log_probs(with_mark)[:, 4], bound.log_probs(ids)[:, 3])

    def test_nothing_but_special_tokens(self, bound):
        result = bound.log_probs(torch.full((2, 6), PAD))
        torch.testing.assert_close(result, bound.first_log_probs().expand(2, 6, -1), atol=1e-4, rtol=1e-4)


def test_long_texts_are_read_in_pieces_like_the_whole(bound, monkeypatch):
    ids = random_ids(2, 150)
    ids[1, :70] = PAD  # longer than a piece
    pieces = bound.log_probs(ids)
    monkeypatch.setattr(body, "_WINDOWS_AT_ONCE", 1000)
    torch.testing.assert_close(pieces, bound.log_probs(ids), atol=1e-4, rtol=1e-4)


class TestSession:
    """Following generations step by step equals reading the whole, whatever happens to the rows."""

    scripts = st.lists(
        st.one_of(
            st.tuples(st.just("extend"), st.integers(1, 3), st.booleans()),
            st.tuples(st.just("extend"), st.just(1), st.booleans()),
            st.tuples(st.just("roll back"), st.integers(0, 12), st.just(False)),
            st.tuples(st.just("reorder"), st.integers(0, 10**6), st.booleans()),
            st.tuples(st.just("rows"), st.integers(1, 4), st.just(False)),
            st.tuples(st.just("repeat"), st.just(0), st.just(False)),
            st.tuples(st.just("new text"), st.integers(0, 40), st.booleans()),
        ),
        max_size=30,
    )

    @settings(max_examples=60, deadline=None)
    @given(script=scripts, seed=st.integers(0, 1000))
    def test_any_history(self, bound, script, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(rows, length, *, special):
            return torch.randint(0 if special else 3, 6 if special else SIZE, (rows, length), generator=generator)

        slack, KeyValueRing.slack = KeyValueRing.slack, 5
        try:
            session = RowSession(bound)
            ids = draw(2, 3, special=True)
            for action, number, special in [("repeat", 0, False), *script]:
                rows, length = ids.shape
                if action == "extend":
                    ids = torch.cat([ids, draw(rows, number, special=special)], dim=1)
                elif action == "roll back":
                    ids = ids[:, : max(1, length - number)]
                elif action == "reorder":
                    ids = ids[torch.randint(0, rows, (rows,), generator=generator)]
                    if special:  # as beam search does: reordered and extended at once
                        ids = torch.cat([ids, draw(rows, 1, special=False)], dim=1)
                elif action == "rows":
                    ids = ids[torch.arange(number) % rows]
                elif action == "new text":
                    ids = draw(rows, number, special=special)
                self.check(bound, session, ids)
        finally:
            KeyValueRing.slack = slack

    @staticmethod
    def check(bound, session, ids):
        said, readings = session.step(ids, torch.tensor([2.5, math.inf]))
        assert readings == [2.5, math.inf]
        if ids.shape[1]:
            expected = bound.sequence(ids).positions(ids.shape[1] - 1, ids.shape[1]).hidden[:, -1]
        else:
            expected = bound.states(ids)[:, -1]
        torch.testing.assert_close(said.hidden, expected, atol=1e-4, rtol=1e-3)

    def test_long_generation(self, bound):
        session, ids = RowSession(bound), random_ids(3, 200)
        ids[1, :5] = PAD
        for length in range(8, 200):
            said, _ = session.step(ids[:, :length], torch.zeros(1))
        assert session.session.memory_bytes == 3 * 2 * 2 * 32 * (8 + KeyValueRing.slack) * 4, "rows, layers, k and v"
        torch.testing.assert_close(said.hidden, bound.sequence(ids[:, :199]).hidden[:, -1], atol=1e-4, rtol=1e-3)

    def test_ids_written_over_by_the_caller_are_noticed(self, bound):
        session, ids = RowSession(bound), random_ids(1, 6)
        session.step(ids, torch.zeros(1))
        ids[0, 2] = 50
        said, _ = session.step(ids, torch.zeros(1))
        torch.testing.assert_close(said.hidden, bound.sequence(ids).hidden[:, -1], atol=1e-4, rtol=1e-3)


class TestBadInput:
    """One clear sentence each."""

    @pytest.mark.parametrize("wrong", [-1, SIZE, 10**6])
    def test_ids_outside_the_vocabulary(self, bound, wrong):
        with pytest.raises(VocabularyMismatchError, match=f"id {wrong} is outside the vocabulary of 96 ids .*'words'"):
            bound.log_probs(torch.tensor([[4, wrong, 5]]))

    def test_shapes(self, bound):
        with pytest.raises(VocabularyMismatchError, match=r"must be \[batch, length\], got shape \(4,\)"):
            bound.log_probs(torch.tensor([4, 5, 6, 7]))
        with pytest.raises(VocabularyMismatchError, match=r"attention_mask has shape \(1, 3\) but input_ids \(1, 4\)"):
            bound.log_probs(random_ids(1, 4), torch.ones(1, 3))

    def test_dtype(self, calibrator):
        with pytest.raises(InputError, match="float32, bfloat16 or float16, got dtype=torch.int8"):
            calibrator.bind(make_vocabulary(), dtype=torch.int8)

    def test_no_tokenizer(self, calibrator):
        with pytest.raises(VocabularyError):
            calibrator.bind(object())

    def test_vocabulary_of_one_token(self, calibrator):
        with pytest.raises(VocabularyError, match="at least 2 tokens"):
            calibrator.bind(Vocabulary.from_byte_strings([b"a", None]))

    def test_empty_input(self, bound):
        assert bound.log_probs(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, SIZE)


class TestDiskCache:
    """Bound vectors are kept, keyed by what they were made of."""

    @pytest.fixture
    def composed(self, monkeypatch):
        """How often a vocabulary was composed."""
        calls = []
        original = calibrator_module.compose_vocabulary

        def counted(*arguments):
            calls.append(arguments)
            return original(*arguments)

        monkeypatch.setattr(calibrator_module, "compose_vocabulary", counted)
        return calls

    def files(self):
        return sorted((cache_folder() / "bound").glob("*"))

    def test_second_time_nothing_is_composed(self, calibrator, composed):
        first = calibrator.bind(make_vocabulary())
        second = calibrator.bind(make_vocabulary())
        assert len(composed) == 1
        assert torch.equal(first.vectors, second.vectors)
        assert torch.equal(first._biases, second._biases)
        assert second.vectors.data_ptr() % 64 == 0
        assert len(self.files()) == 1

    def test_can_be_switched_off(self, calibrator, composed):
        for _ in range(2):
            calibrator.bind(make_vocabulary(), use_disk_cache=False)
        assert len(composed) == 2
        assert self.files() == []

    def test_other_weights_other_vocabulary_other_precision(self, calibrator, composed):
        calibrator.bind(make_vocabulary())
        calibrator.bind(make_vocabulary(80))
        calibrator.bind(make_vocabulary(), dtype=torch.bfloat16)
        changed = make_calibrator()
        with torch.no_grad():
            changed.composer.table[5, 3] += 1e-3
        changed.bind(make_vocabulary())
        assert len(composed) == 4
        assert len(self.files()) == 4

    def test_the_name_of_the_tokenizer_does_not_count(self, calibrator, composed):
        tokens = [b"a", b"b", None]
        calibrator.bind(Vocabulary.from_byte_strings(tokens, name="one"))
        calibrator.bind(Vocabulary.from_byte_strings(tokens, name="two"))
        assert len(composed) == 1

    damages = {
        "empty": lambda content: b"",
        "foreign": lambda content: b"not a file of tensors",
        "truncated": lambda content: content[:-50],
        "a flipped bit": lambda content: content[:-99] + bytes([content[-99] ^ 16]) + content[-98:],
        "zeroed": lambda content: content[: len(content) // 5] + bytes(len(content) - len(content) // 5),
    }

    @pytest.mark.parametrize("damage", damages.values(), ids=damages.keys())
    def test_a_damaged_file_is_made_again_with_a_warning(self, calibrator, composed, caplog, damage):
        expected = calibrator.bind(make_vocabulary())
        (path,) = self.files()
        path.write_bytes(damage(path.read_bytes()))
        with caplog.at_level(logging.WARNING, logger="calibfuse"):
            again = calibrator.bind(make_vocabulary())
        assert "Ignoring the damaged cache file" in caplog.text
        assert torch.equal(again.vectors, expected.vectors)
        calibrator.bind(make_vocabulary())
        assert len(composed) == 2, "the damaged file was replaced by a good one"

    def test_a_folder_that_cannot_be_written_only_warns(self, calibrator, tmp_path, monkeypatch, caplog):
        blocker = tmp_path / "file"
        blocker.write_text("in the way")
        monkeypatch.setenv("CALIBFUSE_CACHE", str(blocker))
        with caplog.at_level(logging.WARNING, logger="calibfuse"):
            bound = calibrator.bind(make_vocabulary())
        assert "could not be cached" in caplog.text
        assert bound.target_vocab_size == SIZE
        assert blocker.read_text() == "in the way"

    @pytest.fixture
    def encoded(self, monkeypatch):
        """How often the tokens of a tokenizer were turned into bytes."""
        calls = []
        original = vocabulary_module.encode_tokens

        def counted(table):
            calls.append(table.name)
            return original(table)

        monkeypatch.setattr(vocabulary_module, "encode_tokens", counted)
        return calls

    def test_the_bytes_of_a_tokenizer_are_remembered(self, calibrator, byte_fallback_tokenizer, encoded, tmp_path):
        path = tmp_path / "tokenizer.json"
        byte_fallback_tokenizer.save(str(path))
        for source in (byte_fallback_tokenizer, str(path)):
            first, second = calibrator.bind(source).vocabulary, calibrator.bind(source).vocabulary
            for name in ("data", "offsets", "is_special", "is_fallback"):
                assert np.array_equal(getattr(first, name), getattr(second, name))
            assert first.name == second.name
        assert len(encoded) == 2
        calibrator.bind(byte_fallback_tokenizer, use_disk_cache=False)
        assert len(encoded) == 3

    def test_a_tokenizer_that_was_changed_is_read_again(self, calibrator, byte_fallback_tokenizer, encoded, tmp_path):
        changed = type(byte_fallback_tokenizer).from_str(byte_fallback_tokenizer.to_str())
        calibrator.bind(changed)
        size = changed.get_vocab_size()
        changed.add_tokens(["quite new"])
        assert calibrator.bind(changed).vocabulary.token_bytes(size) == b"quite new"
        path = tmp_path / "tokenizer.json"
        byte_fallback_tokenizer.save(str(path))
        calibrator.bind(path)
        changed.save(str(path))
        assert calibrator.bind(path).target_vocab_size == size + 1
        assert len(encoded) == 4

    def test_damaged_bytes_of_a_tokenizer_are_read_again(self, calibrator, byte_fallback_tokenizer, encoded, caplog):
        expected = calibrator.bind(byte_fallback_tokenizer).vocabulary.fingerprint
        (path,) = (cache_folder() / "vocabularies").glob("*")
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
        assert calibrator.bind(byte_fallback_tokenizer).vocabulary.fingerprint == expected
        assert "Ignoring the damaged cache file" in caplog.text
        assert len(encoded) == 2

    def test_without_a_home_directory_loading_goes_on_with_a_warning(
        self, calibrator, byte_fallback_tokenizer, monkeypatch, caplog
    ):
        expected = calibrator.bind(byte_fallback_tokenizer, use_disk_cache=False)
        for name in ("CALIBFUSE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
        with caplog.at_level(logging.WARNING, logger="calibfuse"):
            bound = calibrator.bind(byte_fallback_tokenizer)
        assert "set CALIBFUSE_CACHE" in caplog.text
        assert torch.equal(bound.vectors, expected.vectors)
        assert alignment_folders(None, calibrator.fingerprint) == ()

    def test_a_cache_that_may_not_be_entered_only_warns(
        self, calibrator, byte_fallback_tokenizer, tmp_path, monkeypatch, caplog
    ):
        (tmp_path / "locked").mkdir()
        monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "locked"))
        original = os.stat

        def refused(path, *arguments, **options):  # root may enter every folder
            if "locked" in os.fspath(path):
                raise PermissionError(13, "Permission denied", path)
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, "stat", refused)
        with caplog.at_level(logging.WARNING, logger="calibfuse"):
            bound = calibrator.bind(byte_fallback_tokenizer)
        assert bound.target_vocab_size > 0
        assert "Not reading the cache file" in caplog.text

    def test_where_it_is(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path))
        assert cache_folder() == tmp_path
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("CALIBFUSE_CACHE", "~/bound")
        assert cache_folder() == tmp_path / "home" / "bound"
        monkeypatch.delenv("CALIBFUSE_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "calibfuse"


class TestDevices:
    """Moving, as far as a machine without another device can tell: the meta device stands for one."""

    def test_staying_gives_the_same_object(self, bound):
        assert bound.to("cpu") is bound

    def test_moving_leaves_the_original_where_it_was(self):
        bound = make_bound()
        moved = bound.to("meta")
        assert moved.device.type == "meta"
        assert moved.calibrator.boundary.device.type == "meta"
        assert bound.calibrator.boundary.device.type == "cpu"
        assert bound.log_probs(random_ids(1, 4)).isfinite().all()


def test_coverage_counts_the_ids_with_bytes(bound):
    assert bound.coverage == pytest.approx(93 / 96)
    covered = bound.covers(torch.tensor([[0, 2, 3, 95, 96, 10_000, -1]]))
    assert covered.tolist() == [[False, False, True, True, False, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tokenizer_family_can_be_bound(calibrator, any_tokenizer, dtype):
    bound = calibrator.bind(any_tokenizer, dtype=dtype)
    ids = torch.tensor([any_tokenizer.encode("A quick brown fox.", add_special_tokens=False).ids])
    torch.testing.assert_close(bound.log_probs(ids).logsumexp(-1), torch.zeros_like(ids).float(), atol=1e-4, rtol=0)


def test_the_bundled_calibrator_in_bfloat16(byte_level_tokenizer, sample_lines):
    bundled = Calibrator.from_pretrained()
    ids = torch.tensor([byte_level_tokenizer.encode(" ".join(sample_lines[:30])).ids[:300]])
    full, half = (
        bundled.bind(byte_level_tokenizer, dtype=dtype).log_probs(ids) for dtype in (torch.float32, torch.bfloat16)
    )
    difference = (full - half).abs()
    assert difference.mean() < 0.01
    assert difference.gather(-1, full.topk(200).indices).max() < 0.03
