"""Training of the linear scorer: labelled texts in, a `LinearScorer` with calibrated probabilities out.

The logistic loss of a soft maximum over each text's windows (Ray and Craven 2005) plus an L2 penalty, minimised over
all texts at once by L-BFGS: the same result for the same data. scikit-learn's logistic regression knows no maximum over
windows, so the loss stands here; its optimiser (SciPy's) and its metrics serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import DataError, InputError, MissingDependencyError
from calibfuse.scorers.labelled_files import LabelledTexts
from calibfuse.scorers.linear import FeatureConfig, LinearScorer, NgramHasher, Windows, check_window_sizes
from calibfuse.scorers.plain_words import WordStream, split_words

_NEUTRAL_CAP = 0.5  # logits; about what an ordinary word adds
_CORRECTIONS = 12  # past steps that shape the next one of L-BFGS
_SMALLEST_GAIN = 1e-6  # share of the loss that a step must gain


@dataclass(frozen=True)
class TrainingOptions:
    """How a linear scorer is trained."""

    features: FeatureConfig = field(default_factory=FeatureConfig)
    windows: tuple[int, ...] = (3, 16)  # sizes of the windows in words, ascending
    l2: float = 1e-5  # penalty on squared weights, against the mean loss per text
    pool_temperature: float = 0.15  # logits; towards 0 the soft maximum becomes the maximum that scoring uses
    iterations: int = 110  # steps of L-BFGS
    held_out: float = 0.1  # share of the texts kept for Platt's calibration and the reported figures
    calibration_words: int = 40  # held-out texts up to this length calibrate: generated text is short
    seed: int = 0  # of the held-out split

    def __post_init__(self) -> None:
        """Refuse (InputError) options out of range."""
        check_window_sizes(self.windows)
        if self.iterations < 1 or self.calibration_words < 1:
            raise InputError(
                f"iterations and calibration_words must be at least 1, got {self.iterations}, {self.calibration_words}"
            )
        if not self.l2 >= 0 or not self.pool_temperature > 0 or not 0 < self.held_out < 1:
            got = f"got {self.l2}, {self.pool_temperature} and {self.held_out}"
            raise InputError(f"l2 must be >= 0, pool_temperature > 0 and held_out between 0 and 1, {got}")


def _add_up(index: NDArray[np.int64], values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    return np.bincount(index, values, minlength=size).astype(np.float64, copy=False)


class _Objective:
    """Loss and gradient of the scorer on a fixed set of texts.

    A word's value depends on the word alone (and its pair on two words), so it is computed once per distinct word.
    """

    def __init__(self, data: LabelledTexts, options: TrainingOptions) -> None:
        self.options = options
        stream = split_words(data.texts, unmask=options.features.unmask)
        if not len(stream):
            raise DataError(f"None of the {len(data)} training texts has a word")
        hasher = NgramHasher(options.features)
        states = hasher.word_states(stream).astype(np.uint64) << np.uint64(32)
        states |= hasher.word_buckets(stream).astype(np.uint64) ^ (stream.lengths.astype(np.uint64) << np.uint64(24))
        _, first_of, self.word_of = np.unique(states, return_index=True, return_inverse=True)
        distinct = _distinct_words(stream, first_of)
        buckets, owner, scale = _word_features(hasher, distinct)
        pair_buckets, has_pair = hasher.bigram_buckets(stream)
        self.has_pair = has_pair & options.features.word_bigrams
        used, inverse = np.unique(np.concatenate([buckets, pair_buckets[self.has_pair]]), return_inverse=True)
        self.used = used.astype(np.int64)
        self.feature, self.pair_feature = inverse[: len(buckets)], inverse[len(buckets) :]
        self.owner, self.scale, self.n_distinct = owner, scale, len(distinct)
        # Texts without words cannot teach anything; the others, in order
        self.texts, self.position = np.unique(stream.text_index, return_inverse=True)
        self.labels = data.labels[self.texts]
        self.weights = np.full(len(self.texts), 1.0 / len(self.texts))
        self.n_words = len(stream)
        self.windows = Windows.of(self.position, options.windows)

    @property
    def size(self) -> int:
        """Number of parameters: one per used bucket, and the bias."""
        return len(self.used) + 1

    def word_values(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """[words] float64: the value of each word with its pair."""
        alone = _add_up(self.owner, weights[self.feature] * self.scale, self.n_distinct)
        values = alone[self.word_of]
        values[self.has_pair] += weights[self.pair_feature]
        return values

    def __call__(self, parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The loss and its gradient, [size] float64."""
        weights, bias = parameters[:-1], parameters[-1]
        temperature = self.options.pool_temperature
        windows = self.windows
        scaled = windows.sums(self.word_values(weights)) / temperature
        top = np.maximum.reduceat(scaled, windows.firsts)
        exponentials = np.exp(scaled - top[windows.text_index])
        sums = np.add.reduceat(exponentials, windows.firsts)
        logits = temperature * (top + np.log(sums)) + bias
        loss = float(self.weights @ (np.logaddexp(0.0, logits) - self.labels * logits))
        loss += 0.5 * self.options.l2 * float(weights @ weights)

        slope = self.weights * (0.5 * (1.0 + np.tanh(0.5 * logits)) - self.labels)  # d loss / d logit
        per_window = exponentials * (slope / sums)[windows.text_index]
        # each word collects from the windows that cover it: +1 at their start, -1 at their stop, summed along
        changes = _add_up(windows.starts, per_window, self.n_words + 1)
        changes -= _add_up(windows.stops, per_window, self.n_words + 1)
        per_word = np.cumsum(changes)[:-1]
        per_distinct = _add_up(self.word_of, per_word, self.n_distinct)
        gradient = _add_up(self.feature, per_distinct[self.owner] * self.scale, len(weights))
        gradient += _add_up(self.pair_feature, per_word[self.has_pair], len(weights))
        gradient += self.options.l2 * weights
        return loss, np.concatenate([gradient, [slope.sum()]])


def _distinct_words(stream: WordStream, first_of: NDArray[np.int64]) -> WordStream:
    """A stream that holds the given words once each, every one its own text."""
    lengths = stream.lengths[first_of]
    stops = np.cumsum(lengths + 1)
    place = np.arange(int(stops[-1])) - np.repeat(stops - lengths - 1, lengths + 1)
    source = np.repeat(stream.starts[first_of] - 1, lengths + 1) + place
    data = np.append(stream.data[source], np.uint8(32))
    index = np.arange(len(first_of))
    return WordStream(data, np.zeros(len(data), dtype=np.int64), stops - lengths, lengths, index, len(index))


def _word_features(
    hasher: NgramHasher, words: WordStream
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For every feature of every word: its bucket, the word, and the factor of its weight."""
    n_words = len(words)
    word_at = np.repeat(np.arange(n_words), words.lengths + 1)
    word_at = np.append(word_at, n_words - 1)
    buckets = [hasher.word_buckets(words).astype(np.int64)]
    owners = [np.arange(n_words)]
    for numbers, exists in hasher.char_buckets(words):
        buckets.append(numbers[exists].astype(np.int64))
        owners.append(word_at[exists])
    factor = 1.0 / np.sqrt(np.maximum(hasher.ngram_counts(words), 1))
    owner = np.concatenate(owners)
    scale = factor[owner]
    scale[:n_words] = 1.0
    return np.concatenate(buckets), owner, scale


def fit_platt(logits: NDArray[np.float64], labels: NDArray[np.float64]) -> tuple[float, float]:
    """Fit sigmoid(slope * logit + intercept) to labels by Newton's method.

    Platt (1999), with his smoothed targets in the form of a weak prior on slope 1, intercept 0. Both (texts,); labels
    are toxicity in [0, 1]. DataError where the labels do not rise with the logits.
    """
    design = np.stack([logits, np.ones_like(logits)], axis=1)
    prior = np.array([1.0, 0.0])
    solution = prior.copy()
    for _ in range(50):
        probability = 0.5 * (1.0 + np.tanh(0.5 * (design @ solution)))
        gradient = design.T @ (probability - labels) + (solution - prior)
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design + np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        solution = solution - step / max(1.0, float(np.abs(step).max()))  # at most 1 at a time
        if np.abs(step).max() < 1e-9:
            break
    if not solution[0] > 0:
        raise DataError("On held-out texts the scores do not rise with toxicity: labels swapped, or too few texts")
    return float(solution[0]), float(solution[1])


def area_under_curve(scores: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    """Area under the ROC curve of scores (texts,); labels above 0.5 are toxic; DataError where a class is empty."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise _needs_sklearn() from error
    positive = labels > 0.5
    if positive.all() or not positive.any():
        raise DataError(
            f"The area under the curve needs both classes, got {positive.sum()} toxic and {(~positive).sum()} others"
        )
    return float(roc_auc_score(positive, scores))


def _needs_sklearn() -> MissingDependencyError:
    return MissingDependencyError(
        "Training and measuring a scorer need scikit-learn; install it with `pip install calibfuse[eval]`"
    )


def _minimise(objective: _Objective, iterations: int, progress: Callable[[float], None]) -> NDArray[np.float64]:
    try:
        from scipy.optimize import OptimizeResult, minimize
    except ImportError as error:
        raise _needs_sklearn() from error

    def after_step(intermediate_result: OptimizeResult) -> None:
        progress(float(intermediate_result.fun))

    limits = {"maxiter": iterations, "maxfun": 10 * iterations, "maxcor": _CORRECTIONS}
    options = {**limits, "ftol": _SMALLEST_GAIN, "gtol": 0}
    start = np.zeros(objective.size)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", callback=after_step, options=options)
    best: NDArray[np.float64] = found.x
    return best


def _neutralise(weights: NDArray[np.float64], features: FeatureConfig, words: Sequence[str]) -> None:
    """Lower, in place, the own weight of words whose value exceeds `_NEUTRAL_CAP`."""
    stream = split_words(words)
    if not len(stream):
        return
    _, first_of = np.unique([stream.word(i) for i in range(len(stream))], return_index=True)
    distinct = _distinct_words(stream, first_of)
    hasher = NgramHasher(features)
    buckets, owner, scale = _word_features(hasher, distinct)
    values = _add_up(owner, weights[buckets] * scale, len(distinct))
    own = hasher.word_buckets(distinct).astype(np.int64)
    weights[own] -= np.maximum(values - _NEUTRAL_CAP, 0.0)


def train_linear_scorer(
    data: LabelledTexts,
    options: TrainingOptions,
    *,
    augment: Callable[[LabelledTexts], LabelledTexts | None] | None = None,
    neutral_words: Sequence[str] = (),
    name: str = "linear",
    facts: dict[str, Any] | None = None,
    progress: Callable[[float], None] = lambda loss: None,
) -> LinearScorer:
    """Train a linear scorer; DataError for too few texts, only one class, or texts without words.

    `augment` makes further texts to learn from and never sees the held-out ones; the own weight of `neutral_words` is
    capped, their pairs keep what they learned; `facts` go into the checkpoint; `progress` gets the loss of every step.
    """
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(data))
    n_held_out = round(options.held_out * len(data))
    held_out, training = data.take(order[:n_held_out]), data.take(order[n_held_out:])
    for part, what in ((training, "training"), (held_out, "held-out")):
        n_toxic = int((part.labels > 0.5).sum())
        if n_toxic == 0 or n_toxic == len(part):
            raise DataError(f"The {what} texts need both classes; {n_toxic} of {len(part)} are toxic. Give more texts")
    added = augment(training) if augment is not None else None
    training = training if added is None else training + added
    objective = _Objective(training, options)
    parameters = _minimise(objective, options.iterations, progress)
    weights = np.zeros(1 << options.features.bucket_bits)
    weights[objective.used] = parameters[:-1]
    _neutralise(weights, options.features, neutral_words)
    weights = weights.astype(np.float16)  # as on disk, so that calibration and figures hold for the saved scorer
    scorer = LinearScorer(weights, options.features, bias=float(parameters[-1]), windows=options.windows, name=name)
    logits = scorer.logits(held_out.texts)
    # A long comment has many windows, hence a high maximum: calibrated on it, a short text would look too calm.
    short = np.array([len(text.split()) <= options.calibration_words for text in held_out.texts])
    labels = held_out.labels[short]
    scorer.slope, scorer.intercept = fit_platt(logits[short], labels)
    probability = np.clip(scorer.probability(logits[short]), 1e-9, 1 - 1e-9)
    log_loss = -np.mean(labels * np.log(probability) + (1 - labels) * np.log(1 - probability))
    named = ("calibration_words", "windows", "l2", "pool_temperature", "iterations", "seed")
    scorer.training = {
        **(facts or {}),
        "training_texts": len(training),
        "held_out_texts": len(held_out),
        "held_out_auc": round(area_under_curve(logits, held_out.labels), 5),
        "calibration_texts": int(short.sum()),
        "calibration_log_loss_nats": round(float(log_loss), 5),
        **{name: getattr(options, name) for name in named},
        "windows": list(options.windows),
    }
    return scorer
