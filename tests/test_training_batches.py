"""Packing and the sampled softmax: against hand-made rows and the full softmax."""

import numpy as np
import pytest
import torch

from calibfuse.calibrator import Calibrator, CalibratorConfig
from calibfuse.training.batches import BOUNDARY, IGNORE, BatchVocabulary, make_batch, pack_rows
from calibfuse.training.trainer import TrainingObjective
from calibfuse.vocabulary import Vocabulary

SHAPE = CalibratorConfig(
    bucket_count=512, token_width=16, composer_hidden_width=16, width=16, layer_count=1, head_count=2, hidden_width=32,
    window=8, adapter_width=8,
)  # fmt: skip


def vocabulary_of(size: int) -> Vocabulary:
    return Vocabulary.from_byte_strings([None, *(f"token{i}".encode() for i in range(size - 1))])


def test_rows_begin_with_a_boundary_and_passages_go_on_in_the_next_row():
    passages = iter([([1, 2], True), ([3, 4, 5, 6], False), ([7], True)])
    ids, flags = pack_rows(passages, batch_size=2, sequence_length=5)
    # row 0: boundary, 1 2, boundary, 3 4; row 1: boundary, 5 6, boundary, 7, boundary
    assert ids.tolist() == [[BOUNDARY, 1, 2, BOUNDARY, 3, 4], [BOUNDARY, 5, 6, BOUNDARY, 7, BOUNDARY]]
    assert flags.tolist() == [[False, True, True, False, False, False], [False, False, False, False, True, False]]


def test_rows_stay_boundary_when_the_passages_run_out():
    ids, flags = pack_rows(iter([([1], True)]), batch_size=2, sequence_length=3)
    assert ids.tolist() == [[BOUNDARY, 1, BOUNDARY, BOUNDARY], [BOUNDARY] * 4]
    assert flags.sum() == 1


def test_a_batch_points_at_the_same_tokens_as_its_rows():
    vocabulary = vocabulary_of(50)
    table = BatchVocabulary(vocabulary, np.arange(50)[::-1].copy(), bucket_count=512, candidate_count=100)
    ids = np.array([[BOUNDARY, 5, 6, BOUNDARY, 7, 0]])  # 0 is special: it has no bytes
    flags = np.array([[False, True, True, False, False, False]])
    batch = make_batch(ids, flags, table, np.random.default_rng(0))
    local = np.union1d(table.covered_ids, [5, 6, 7])
    assert batch.inputs.tolist() == [[BOUNDARY, *(np.searchsorted(local, [5, 6])), BOUNDARY, np.searchsorted(local, 7)]]
    targets = batch.targets[0].tolist()
    assert [local[batch.candidates[t]] if t != IGNORE else None for t in targets] == [5, 6, None, 7, None]
    assert batch.is_non_toxic.tolist() == [[True, True, False, False, False]]
    assert batch.target_bytes == len("token4" + "token5" + "token6")


def test_targets_and_frequent_tokens_are_always_candidates():
    vocabulary = vocabulary_of(5000)
    counts = np.zeros(5000, dtype=np.int64)
    counts[100:120] = 10
    table = BatchVocabulary(vocabulary, counts, bucket_count=512, candidate_count=80)
    ids, log_weights = table.draw_candidates(np.array([4000, 4500]), np.random.default_rng(0))
    assert {4000, 4500, *range(100, 120)} <= set(ids.tolist())
    assert len(set(ids.tolist())) == len(ids)
    assert 0 not in ids
    # certain candidates stand for themselves, all together for the whole vocabulary
    assert np.exp(log_weights.astype(np.float64)).sum() == pytest.approx(4999, rel=1e-5)
    assert (log_weights[np.isin(ids, [4000, 4500])] == 0).all()


def test_ids_with_equal_bytes_count_for_one_together():
    strings = [f"token{i}".encode() for i in range(4999)]
    vocabulary = Vocabulary.from_byte_strings([None, *strings, *strings])
    table = BatchVocabulary(vocabulary, np.zeros(9999, dtype=np.int64), bucket_count=512, candidate_count=4000)
    _, log_weights = table.draw_candidates(np.array([1, 5000]), np.random.default_rng(0))
    assert np.exp(log_weights.astype(np.float64)).sum() == pytest.approx(4999, rel=1e-4)


def test_the_sampled_loss_estimates_the_full_one():
    """The mean over 200 draws of candidates is within 1 % of the full softmax."""
    torch.manual_seed(0)
    vocabulary = vocabulary_of(2000)
    objective = TrainingObjective(Calibrator(SHAPE))
    ids = np.random.default_rng(1).integers(1, 2000, (2, 17))
    ids[:, 0] = BOUNDARY
    flags = np.ones_like(ids, dtype=bool)
    flags[1] = False

    def loss(candidates: int, seed: int) -> tuple[float, float]:
        table = BatchVocabulary(
            vocabulary, np.zeros(2000, dtype=np.int64), bucket_count=512, candidate_count=candidates
        )
        losses = objective(make_batch(ids, flags, table, np.random.default_rng(seed)))
        return float(losses.reference), float(losses.calibrator)

    full = loss(5000, 0)
    sampled = np.mean([loss(300, seed) for seed in range(200)], axis=0)
    assert sampled == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("twins", [0, 20])
def test_the_loss_is_the_mean_cross_entropy_of_the_bound_calibrator(twins):
    """Also where ids have equal bytes, which share their probability."""
    torch.manual_seed(0)
    calibrator = Calibrator(SHAPE).eval()
    for head in calibrator.heads.values():
        torch.nn.init.normal_(head.query.weight)
    strings = [f"token{i}".encode() for i in range(59 - twins)]
    vocabulary = Vocabulary.from_byte_strings([None, *strings, *strings[:twins]])
    assert (vocabulary.log_shares < 0).sum() == 2 * twins
    table = BatchVocabulary(vocabulary, np.zeros(60, dtype=np.int64), bucket_count=512, candidate_count=100)
    ids = np.array([[BOUNDARY, 3, 4, 5, 6], [BOUNDARY, 9, 8, 7, 6]])
    flags = np.array([[True] * 5, [False] * 5])
    losses = TrainingObjective(calibrator)(make_batch(ids, flags, table, np.random.default_rng(0)))

    bound = calibrator.bind(vocabulary, use_disk_cache=False)
    nats = []
    for row in torch.from_numpy(ids[:, 1:]):
        first = bound.first_log_probs("reference")[row[0]]
        rest = bound.reference_log_probs(row[None])[0, :-1].gather(1, row[1:, None])
        nats.append(-torch.cat([first[None], rest[:, 0]]))
    special_share = 1e-4  # log_probs leaves the special tokens this much
    expected = float(torch.cat(nats).mean()) - special_share
    assert float(losses.reference.detach()) == pytest.approx(expected, abs=1e-3)
    assert int(losses.tokens) == 8


def test_gradients_of_the_summed_cross_entropy_are_those_of_torch():
    from calibfuse.training.trainer import _SummedCrossEntropy

    scores = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    assert torch.autograd.gradcheck(lambda s: _SummedCrossEntropy.apply(s, targets), (scores,))
