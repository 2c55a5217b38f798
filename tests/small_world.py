"""A world of ten tokens in which everything about a constraint can be counted: all continuations of one prompt.

Base: a tiny random Llama. R, q and their expectations follow from the joint probabilities by sums over whole axes, with
none of the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibfuse.value.samples import SampleSet
from calibfuse.vocabulary import Vocabulary

SIZE, LENGTH = 10, 4
PROMPT = (0, 5)  # the begin mark and a word, so that a later begin mark is one in the middle of a text
WORLD_VOCABULARY = Vocabulary.from_byte_strings([None, *(f" w{token}".encode() for token in range(1, SIZE))], "world")


@dataclass(frozen=True)
class World:
    """One base model and one constraint.

    Attributes:
        base: the model p.
        sequences: int64 [SIZE ** LENGTH, prompt + LENGTH], all of them, in the order of `joint.flatten()`.
        joint: float64 [SIZE] * LENGTH, p of each continuation.
        constraint: float64 [SIZE] * LENGTH, C of each.
    """

    base: object
    sequences: Tensor
    joint: Tensor
    constraint: Tensor

    def r(self, count: int) -> Tensor:
        """E_p[C | the first `count` tokens of the continuation], float64 [SIZE] * count."""
        axes = tuple(range(count, LENGTH))
        return (self.joint * self.constraint).sum(axes) / self.joint.sum(axes) if axes else self.constraint

    def next_probabilities(self, count: int) -> Tensor:
        """p of the next token after each prefix of `count` tokens, float64 [SIZE] * (count + 1)."""
        here = self.joint.sum(tuple(range(count + 1, LENGTH))) if count + 1 < LENGTH else self.joint
        return here / here.sum(-1, keepdim=True)

    def expectation(self, joint: Tensor) -> float:
        """E[C] under another distribution over continuations."""
        return float((joint * self.constraint).sum())

    def samples(self) -> SampleSet:
        """Every continuation once, weighted by its probability: sampling without its noise."""
        count = len(self.sequences)
        return SampleSet(
            self.sequences,
            lengths=torch.full((count,), len(PROMPT) + LENGTH),
            prompt_lengths=torch.full((count,), len(PROMPT)),
            log_weights=self.joint.flatten().log().float(),
            satisfaction=self.constraint.flatten().float(),
        )

    @torch.no_grad()
    def joint_of(self, next_log_probs) -> Tensor:
        """Joint probabilities of a sampler: ids [n, length] -> log-probabilities [n, length, SIZE]."""
        total = torch.zeros(len(self.sequences), dtype=torch.float64)
        log_probs = next_log_probs(self.sequences).double()
        for place in range(len(PROMPT), len(PROMPT) + LENGTH):
            total += log_probs[:, place - 1].gather(1, self.sequences[:, place, None])[:, 0]
        return total.exp().view([SIZE] * LENGTH)


def make_world(base, *, soft: bool) -> World:
    """The world of a base model; the constraint forbids (hard) or discourages (soft) two words and likes a third."""
    continuations = torch.cartesian_prod(*[torch.arange(SIZE)] * LENGTH)
    sequences = torch.cat([torch.tensor(PROMPT).expand(len(continuations), -1), continuations], dim=1)
    bad = (continuations == 7).sum(1) + 2 * (continuations[:, 1:] == 3).sum(1)
    label = 0.75 ** bad.double() * (1.0 - 0.3 * (continuations[:, -1] == 2)) if soft else (bad == 0).double()
    shape = [SIZE] * LENGTH
    world = World(base, sequences, torch.zeros(shape), label.view(shape))
    with torch.no_grad():
        joint = world.joint_of(lambda ids: base(input_ids=ids).logits.double().log_softmax(-1))
    return World(base, sequences, joint, world.constraint)


def softened(base, factor: float = 0.5):
    """Make the fixtures' peaked model unsure, so that many continuations matter."""
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(factor)
    return base


def relative_entropy(q: Tensor, p: Tensor) -> float:
    """KL(q || p) of joint distributions, nats."""
    kept = q > 0
    return float((q[kept] * (q[kept] / p[kept]).log()).sum())


__all__ = ["LENGTH", "PROMPT", "SIZE", "WORLD_VOCABULARY", "World", "make_world", "relative_entropy", "softened"]
