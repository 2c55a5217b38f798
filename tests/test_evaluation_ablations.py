"""The two parts of a calibrator alone: what each moves, and that the calibrator itself stays as it was."""

import pytest
import torch
from tiny_calibrators import make_calibrator, make_vocabulary

from calibfuse.errors import MissingHeadError
from calibfuse.evaluation.ablations import heads_alone, words_alone

IDS = torch.tensor([[5, 9, 17, 30]])
VOCABULARY = make_vocabulary(300)
WORD = 159  # " ka"


def differences(calibrator):
    """log-scores of the calibrator head minus those of the reference, [positions, vocabulary]."""
    said = calibrator.bind(VOCABULARY, use_disk_cache=False).sequence(IDS)
    return (said.log_scores("calibrator") - said.log_scores("reference"))[0]


@pytest.fixture
def calibrator():
    return make_calibrator(words={VOCABULARY.token_bytes(WORD).decode().strip(): -3.0})


def test_words_alone_move_the_tokens_of_words_and_nothing_else(calibrator):
    moved = differences(words_alone(calibrator))
    touched = (moved.abs() > 1e-4).any(dim=0).nonzero().flatten().tolist()
    assert touched == [each for each in range(3, 300) if b"ka" in VOCABULARY.token_bytes(each)]
    assert torch.allclose(moved[:, WORD], torch.full((4,), -3.0), atol=1e-4)


def test_heads_alone_are_the_calibrator_without_its_words(calibrator):
    bare = make_calibrator(words={})
    assert torch.equal(differences(heads_alone(calibrator)), differences(bare))
    assert not torch.allclose(differences(calibrator)[:, WORD], differences(bare)[:, WORD])


def test_the_parts_add_up(calibrator):
    parts = differences(words_alone(calibrator)) + differences(heads_alone(calibrator))
    assert torch.allclose(parts, differences(calibrator), atol=1e-4)


def test_a_calibrator_without_the_part_is_refused():
    with pytest.raises(MissingHeadError, match="no table of words"):
        words_alone(make_calibrator(words={}))
    with pytest.raises(MissingHeadError):
        words_alone(make_calibrator(words={"a": -1.0}, heads=("calibrator",)))
    with pytest.raises(MissingHeadError, match="universal"):
        heads_alone(object())
