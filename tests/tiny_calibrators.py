"""Random calibrators strong enough to change what a random target says, and the processor that forgets everything.

A freshly initialised calibrator says almost nothing: its heads agree and its table is near zero, so cached and
recomputed decoding would agree whatever the cache did. Here every weight is random and large.
"""

from __future__ import annotations

import itertools
import string

import torch
from transformers import LogitsProcessor

from calibfuse.calibrator import BoundCalibrator, Calibrator, CalibratorConfig
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion
from calibfuse.vocabulary import Vocabulary

BOS, EOS, PAD = 0, 1, 2
# Words and pieces of `make_vocabulary`, so that most texts come upon the beginning of one.
WORDS = {"a": -2.0, "ab": -3.0, "ka": -1.5, "b": 0.7, "the": -1.0, "cbd": -2.5, "east": 0.4}


def make_vocabulary(size: int = 96, specials: int = 3) -> Vocabulary:
    """Ids 0 to specials - 1 are special; the others are short words, with and without leading space."""
    words = (
        prefix + a + b + c
        for a, b, c in itertools.product(["", "k", "SH"], string.ascii_lowercase, ["", "é", "1"])
        for prefix in (" ", "")
    )
    return Vocabulary.from_byte_strings(
        [None] * specials + [word.encode() for word in itertools.islice(words, size - specials)], name="words"
    )


def make_calibrator(seed: int = 0, strength: float = 1.0, **config) -> Calibrator:
    """A calibrator whose heads disagree by a few nats times `strength`."""
    settings = {
        "bucket_count": 2048,
        "token_width": 16,
        "composer_hidden_width": 24,
        "width": 32,
        "layer_count": 2,
        "head_count": 2,
        "hidden_width": 48,
        "window": 8,
        "adapter_width": 24,
        "words": WORDS,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        calibrator = Calibrator(CalibratorConfig(**settings)).eval()
        with torch.no_grad():
            for name, parameter in calibrator.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5 * (2.0 if "body" in name else 1.0))
                elif "norm" not in name:
                    parameter.normal_(std=0.5)
            calibrator.composer.table.normal_(std=0.5)
            for head in calibrator.heads.values():
                head.query.weight.mul_(strength)
    return calibrator


def make_bound(seed: int = 0, size: int = 96, strength: float = 1.0, specials: int = 3, **config) -> BoundCalibrator:
    """`make_calibrator` bound to `make_vocabulary`."""
    calibrator = make_calibrator(seed, strength, **config)
    return calibrator.bind(make_vocabulary(size, specials), use_disk_cache=False)


class Forgetful(LogitsProcessor):
    """The fusion with everything computed from scratch on every call: what cached decoding must equal."""

    def __init__(self, bound: BoundCalibrator, config: FusionConfig) -> None:
        self.bound = bound
        self.config = config

    def __call__(self, input_ids, scores):
        return CalibFusion(self.bound, self.config)(input_ids, scores)


def counting_rebuilds(fusion: CalibFusion) -> list[int]:
    """A list that grows by the number of slots fed, once per forward pass of the calibrator's body."""
    fed: list[int] = []
    body = fusion.guide.calibrator.body
    step = type(body).step

    def counted(states, *arguments):
        fed.append(states.shape[1])
        return step(body, states, *arguments)

    body.step = counted
    return fed


__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "Forgetful",
    "counting_rebuilds",
    "make_bound",
    "make_calibrator",
    "make_vocabulary",
]
