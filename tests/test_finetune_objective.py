"""The closed-form KL against enumeration of all sequences of a tiny world, and its edges."""

import itertools
import math

import pytest
import torch

from calibfuse.errors import InputError
from calibfuse.finetune.tuning import constrained_kl, continuation_positions, corpus_loss

VOCABULARY, LENGTH = 4, 3
SEQUENCES = list(itertools.product(range(VOCABULARY), repeat=LENGTH))


def random_world(seed):
    """Next-token distributions of p and p_theta for every prefix, and a C in [0, 1] for every sequence."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for size in range(LENGTH) for prefix in itertools.product(range(VOCABULARY), repeat=size)]

    def draw():
        return {
            prefix: torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
            for prefix in prefixes
        }

    satisfaction = dict(
        zip(SEQUENCES, torch.rand(len(SEQUENCES), generator=generator, dtype=torch.float64).tolist(), strict=True)
    )
    return draw(), draw(), satisfaction


def sequence_probability(tables, sequence):
    return math.exp(sum(float(tables[sequence[:place]][sequence[place]]) for place in range(LENGTH)))


def expected_satisfaction(p, satisfaction, prefix):
    """R(prefix) by summing over all sequences that begin with it."""
    mass = hits = 0.0
    for sequence in SEQUENCES:
        if sequence[: len(prefix)] == prefix:
            probability = sequence_probability(p, sequence)
            mass += probability
            hits += probability * satisfaction[sequence]
    return hits / mass


@pytest.mark.parametrize("seed", [0, 1])
def test_token_kls_in_closed_form_add_up_to_the_enumerated_kl_of_sequences(seed):
    """KL(q || p_theta) over sequences = sum over prefixes of q(prefix) * KL of next-token distributions."""
    from calibfuse.finetune.tuning import constrained_log_probs

    p, p_theta, satisfaction = random_world(seed)
    total = sum(sequence_probability(p, sequence) * satisfaction[sequence] for sequence in SEQUENCES)
    q = {sequence: sequence_probability(p, sequence) * satisfaction[sequence] / total for sequence in SEQUENCES}
    by_enumeration = sum(
        probability * math.log(probability / sequence_probability(p_theta, sequence))
        for sequence, probability in q.items()
    )

    by_tokens = 0.0
    for prefix in p:
        log_r = torch.tensor(
            [expected_satisfaction(p, satisfaction, (*prefix, token)) for token in range(VOCABULARY)],
            dtype=torch.float64,
        ).log()
        log_q = constrained_log_probs(p[prefix], log_r)
        mass = sum(probability for sequence, probability in q.items() if sequence[: len(prefix)] == prefix)
        conditional = [
            sum(chance for sequence, chance in q.items() if sequence[: len(prefix) + 1] == (*prefix, token)) / mass
            for token in range(VOCABULARY)
        ]
        torch.testing.assert_close(log_q.exp().tolist(), conditional, rtol=1e-9, atol=1e-12)
        by_tokens += mass * float(constrained_kl(log_q, p_theta[prefix]))
    assert by_tokens == pytest.approx(by_enumeration, rel=1e-9)


def test_kl_of_equal_distributions_is_zero_and_has_no_gradient():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    divergence = constrained_kl(logits.detach().log_softmax(-1), logits.log_softmax(-1))
    divergence.sum().backward()
    assert float(divergence.detach().abs().max()) < 1e-6
    assert float(logits.grad.abs().max()) < 1e-6


def test_tokens_without_probability_under_q_contribute_nothing():
    log_q = torch.tensor([0.5, 0.5, 0.0]).log()
    log_p = torch.tensor([0.25, 0.25, 0.5]).log().requires_grad_(True)
    divergence = constrained_kl(log_q, log_p)
    divergence.backward()
    assert float(divergence.detach()) == pytest.approx(math.log(2))
    assert torch.isfinite(log_p.grad).all()
    # both zero: a token that the base never says
    assert float(constrained_kl(torch.tensor([1.0, 0.0]).log(), torch.tensor([1.0, 0.0]).log())) == 0.0


def test_different_vocabularies_are_refused():
    with pytest.raises(InputError, match=r"one vocabulary, got shapes \[2, 3\] and \[2, 4\]"):
        constrained_kl(torch.zeros(2, 3), torch.zeros(2, 4))


def test_positions_are_those_whose_next_token_belongs_to_the_continuation():
    lengths, prompts = torch.tensor([6, 3, 2]), torch.tensor([2, 1, 2])
    found = continuation_positions(lengths, prompts, 6)
    expected = [[prompt <= place + 1 < length for place in range(5)] for length, prompt in ((6, 2), (3, 1), (2, 2))]
    assert found.tolist() == expected


def test_corpus_loss_is_the_mean_of_the_next_token():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    slow = [-float(logits[row, place].log_softmax(-1)[ids[row, place + 1]]) for row in range(2) for place in range(4)]
    assert float(corpus_loss(logits, ids)) == pytest.approx(sum(slow) / len(slow), rel=1e-5)
