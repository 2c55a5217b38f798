"""Fusion of the target's and the guide's next-token distributions: the arithmetic, and nothing else.

Only the target's candidates that the guide covers are re-ranked; they keep the probability mass that they had together,
and every other token keeps its own exactly. A new mode is one pure function and one line in MODES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.candidates import choose_candidates
from calibfuse.errors import InputError
from calibfuse.guide import OF_VALUE_HEAD, Part

MAX_ALPHA = 100.0
_NEWTON_STEPS = 6
_MAX_PENALTY = 1e18  # its square is still a float32
_LEAST_NU = 1e-3  # no candidate is raised by more than its inverse
_TINY = 1e-30
_MAX_GAIN, _MAX_LOSS = (
    0.5,
    0.65,
)  # of a candidate by the head "value", nats: alone it halves none, over a text it adds up
_LEAST_DOUBT = 1e-6  # R is never taken for exactly 1
_MOST_LOWERED = 8  # tokens named for each row of a step
_ROWS_AT_ONCE = 8

GuideScores = Callable[[str, Tensor | None], Tensor]
PickedScores = Callable[[Sequence[str], Tensor, Tensor], Mapping[str, Tensor]]
Strength: TypeAlias = float | Tensor  # of all rows, or one number that goes with each candidate


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How to fuse.

    Attributes:
        mode: a key of MODES: "contrast" (default), "geometric", "blend", "value", "embedding".
        alpha: strength; 0 leaves the target as it is. At most 1 for geometric and blend, where 1 means that the guide
            alone ranks the candidates; below 1 for embedding; at most 100 for the others. Default: the mode's.
        candidates: which of the target's tokens are re-ranked. None (default): those to which it gives a probability of
            at least 0.00005, its best 200 in any case, and the words with a bias below 0. A number: so many of its
            best. 0: the whole vocabulary, which mode embedding always takes.
        one_sided: contrast only lowers tokens, never raises one (raising happens only through renormalisation).
        margin: of contrast: a disagreement of calibrator and reference up to this many nats counts as none, and a
            larger one is smaller by as much. What the two disagree about in calm text is mostly noise.
        max_shift: largest change of a candidate's log-probability in contrast and value mode, before renormalisation,
            in nats.
        mass_to_others: of one-sided contrast: the mass that a candidate loses goes to the others, and none of it comes
            back by renormalisation, however certain it was.
        value_weight: of contrast with a guide that has the head "value": strength of that head as a part of alpha. It
            lowers a candidate by 0.65 nats at most and raises it by 0.5 at most. 0: it is not asked.
        harm_threshold: of contrast with value_weight: the probability of harm at which half of a disagreement counts.
        max_excused: likewise: how much of a disagreement that head can excuse, nats. Words with a bias beyond it, such
            as swearing in the bundled calibrator, are lowered whatever the text means.
        hidden_temperature: of mode embedding. True: as published, the target's hidden state gets the weight 1 - alpha,
            which also acts as a temperature of 1 / (1 - alpha). False: it keeps weight 1.
    """

    mode: str = "contrast"
    alpha: float = None  # type: ignore[assignment]  # a float from __post_init__ on: the default is the mode's
    candidates: int | None = None
    one_sided: bool = True
    margin: float = 0.0
    max_shift: float = 10.0
    mass_to_others: bool = False
    value_weight: float = 0.0
    harm_threshold: float = 0.5
    max_excused: float = 10.0
    hidden_temperature: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise InputError(f"Unknown fusion mode {self.mode!r}; choose one of {', '.join(MODES)}.")
        mode = MODES[self.mode]
        if cast("float | None", self.alpha) is None:
            object.__setattr__(self, "alpha", mode.default_alpha)
        limit = f"{'below ' if mode.below_max else ''}{mode.max_alpha:g}"
        number = {name: _number(getattr(self, name)) for name in _NUMBERS}  # nan compares as False
        is_count = self.candidates is None or type(self.candidates) is int and self.candidates >= 0
        for name, holds, expected in (
            ("alpha", mode.allows(number["alpha"]), f"a number from 0 (off) to {limit} in mode {self.mode!r}"),
            ("candidates", is_count, "None (by probability), 0 (whole vocabulary) or a positive integer"),
            *((name, isinstance(getattr(self, name), bool), "True or False") for name in _SWITCHES),
            ("margin", 0.0 <= number["margin"] < math.inf, "a number of nats, 0 or more"),
            ("max_shift", number["max_shift"] > 0.0, "a positive number of nats"),
            ("value_weight", 0.0 <= number["value_weight"] <= MAX_ALPHA, f"a number from 0 to {MAX_ALPHA:g}"),
            ("harm_threshold", 0.0 < number["harm_threshold"] < 1.0, "a probability between 0 and 1"),
            ("max_excused", 0.0 <= number["max_excused"] < math.inf, "a number of nats, 0 or more"),
        ):
            if not holds:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}.")
        for name, value in number.items():
            object.__setattr__(self, name, value)  # plain numbers, which JSON can hold

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FusionConfig:
        """Inverse of `to_dict`; an InputError for unknown keys and values out of range."""
        values = _present_names(values)
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"Unknown fusion options: {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(**values)


_NUMBERS = ("alpha", "margin", "max_shift", "value_weight", "harm_threshold", "max_excused")
_SWITCHES = ("one_sided", "mass_to_others", "hidden_temperature")


def _number(value: object) -> float:
    """The number as Python has it, from NumPy's too; nan for everything else."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def recommended_config(recommended: Mapping[str, Any], options: Mapping[str, Any]) -> FusionConfig:
    """A guide's recommended options, overridden by the user's; for another mode, the user's alone."""
    default = recommended.get("mode", FusionConfig.mode)
    if options.get("mode", default) == default:
        options = {**_present_names(recommended), **_present_names(options)}
    return FusionConfig.from_dict(options)


def _present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their present names: in older files `mass_to_others` is `hold`."""
    return {"mass_to_others" if name == "hold" else name: value for name, value in values.items()}


class Layout:
    """Candidates as a table [..., k], and what is summed over each row, in a shape that goes with the candidates' own.

    Entries where `fixed` is True do not count.
    """

    def __init__(self, fixed: Tensor | None) -> None:
        self.fixed = fixed

    def _fill(self, values: Tensor, number: float) -> Tensor:
        assert self.fixed is not None
        return values.masked_fill(self.fixed, number)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each row's candidates."""
        return self._fill(values, 0.0).sum(dim=-1, keepdim=True)

    def max(self, values: Tensor) -> Tensor:
        """Largest of each row's candidates."""
        return self._fill(values, -torch.inf).amax(dim=-1, keepdim=True)

    def logsumexp(self, scores: Tensor) -> Tensor:
        """Over each row's candidates."""
        return self._fill(scores, -torch.inf).logsumexp(dim=-1, keepdim=True)

    def normalise(self, scores: Tensor) -> Tensor:
        """Log-softmax over each row's candidates; 0 where fixed."""
        return self._fill(self._fill(scores, -torch.inf).log_softmax(dim=-1), 0.0)

    def of_rows(self, values: Tensor) -> Tensor:
        """One number for each row, [rows] -> a shape that goes with the candidates' own."""
        return values[..., None]


class _List(Layout):
    """Candidates as a list [n], those of one row after those of another; none is fixed."""

    def __init__(self, places: Tensor, rows: int) -> None:
        super().__init__(fixed=None)
        self._places = places
        starts = np.searchsorted(places.numpy(), np.arange(rows + 1))
        counts = np.diff(starts)
        self._starts, self._counts = starts[:-1][counts > 0], counts[counts > 0]

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        """Over each row's candidates; NumPy adds up runs many times as fast as torch scatters."""
        if values.requires_grad:
            counts = torch.from_numpy(self._counts)
            totals = torch.segment_reduce(values, how, lengths=counts)
            return totals.repeat_interleave(counts, output_size=len(values))
        reduce = {"sum": np.add, "max": np.maximum}[how].reduceat
        totals = torch.from_numpy(reduce(values.numpy(), self._starts))
        return totals if len(totals) == 1 else torch.from_numpy(np.repeat(totals.numpy(), self._counts))

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, "sum")

    def max(self, values: Tensor) -> Tensor:
        return self._reduced(values, "max")

    def logsumexp(self, scores: Tensor) -> Tensor:
        highest = self.max(scores.detach())
        return highest + self.sum((scores - highest).exp()).log()

    def normalise(self, scores: Tensor) -> Tensor:
        return scores - self.logsumexp(scores)

    def of_rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1).index_select(0, self._places)


@dataclass(frozen=True)
class Mode:
    """One way of fusing."""

    # (target log-probabilities, guide scores by head, layout, strength, config) -> new scores of the candidates. None:
    # the mode fuses hidden states, and needs the target's output head (embedding/fusion.py).
    fuse: Callable[[Tensor, Mapping[str, Tensor], Layout, Strength, FusionConfig], Tensor] | None
    heads: tuple[str, ...]  # of the guide that it needs
    max_alpha: float
    default_alpha: float = 1.0
    below_max: bool = False  # alpha must be less than `max_alpha`
    options: tuple[str, ...] = ("candidates",)  # of FusionConfig, besides alpha, that this mode reads

    def allows(self, alpha: float) -> bool:
        """Whether a number is a strength of this mode."""
        return 0.0 <= alpha <= self.max_alpha and not (self.below_max and alpha == self.max_alpha)


def _contrast(
    target: Tensor, guide: Mapping[str, Tensor], layout: Layout, alpha: Strength, config: FusionConfig
) -> Tensor:
    """Target + clip(alpha d), d = calibrator - reference brought nearer to 0 by the margin (DExperts, Liu et al. 2021).

    With `value_weight` the head "value" adds its own share, and d counts as far as that head takes the text with the
    candidate for harmful: words that are harmless each cost where they amount to harm, and rude ones cost less where
    the text quotes, denies or answers.
    """
    difference = guide["calibrator"] - guide["reference"]
    disagreement = _disagreement(difference, guide.get("value"), config)
    if config.value_weight:
        target = layout.normalise(target + _worth(guide["value"], target, layout, alpha * config.value_weight))
    shift = (alpha * disagreement).clamp(-config.max_shift, 0.0 if config.one_sided else config.max_shift)
    return _give_to_others(target, shift, layout) if config.mass_to_others and config.one_sided else target + shift


def _disagreement(difference: Tensor, log_r: Tensor | None, how: FusionConfig | Part) -> Tensor:
    """Calibrator - reference as far as it counts: beyond the margin, and where the head "value" fears harm."""
    disagreement = functional.softshrink(difference, how.margin) if how.margin else difference
    if log_r is None:
        return disagreement
    excused = disagreement * (1.0 - _harmful_share(log_r, how.harm_threshold))
    return disagreement - excused.clamp(-how.max_excused, how.max_excused)


def _worth(log_r: Tensor, target: Tensor, layout: Layout, strength: Strength) -> Tensor:
    return (strength * _relative(log_r, target, layout)).clamp(-_MAX_LOSS, _MAX_GAIN)


def _as_one(
    guide: Mapping[str, Tensor], parts: Sequence[Part], target: Tensor, layout: Layout, strength: Strength
) -> tuple[dict[str, Tensor], Tensor]:
    """Several guides as one: the sum of their contrasts as a calibrator's; the target with what their values add."""
    if not parts:
        return dict(guide), target
    total, worth = torch.zeros_like(target), torch.zeros_like(target)
    for part in parts:
        log_r = guide[part.value] if part.value_weight else None
        difference = guide[part.calibrator] - guide[part.reference]
        shift = part.alpha * _disagreement(difference, log_r, part)
        total = total + (shift.clamp(max=0.0) if part.one_sided else shift)
        if log_r is not None:
            worth = worth + _worth(log_r, target, layout, strength * part.alpha * part.value_weight)
    if any(part.value_weight for part in parts):
        target = layout.normalise(target + worth)
    return {"calibrator": total, "reference": torch.zeros_like(total)}, target


def _relative(log_r: Tensor, target: Tensor, layout: Layout) -> Tensor:
    """Log R of each candidate minus the logarithm of its expectation under the target's candidates."""
    return log_r - layout.logsumexp(target + log_r)


def _harmful_share(log_r: Tensor, harm_threshold: float) -> Tensor:
    """How far the text with each candidate is taken for harmful, 0 to 1: one half where R is 1 - harm_threshold."""
    log_odds = log_r - torch.log(-torch.expm1(log_r.clamp(max=-_LEAST_DOUBT)))
    return torch.sigmoid(4.0 * (math.log(1.0 - harm_threshold) - math.log(harm_threshold) - log_odds))


def _geometric(
    target: Tensor, guide: Mapping[str, Tensor], layout: Layout, alpha: Strength, config: FusionConfig
) -> Tensor:
    return (1.0 - alpha) * target + alpha * guide["calibrator"]


def _blend(
    target: Tensor, guide: Mapping[str, Tensor], layout: Layout, alpha: Strength, config: FusionConfig
) -> Tensor:
    share = torch.as_tensor(alpha, dtype=torch.float64, device=target.device)  # 1 - 0.99999 has few digits in float32
    kept, given = ((-share).log1p().to(target.dtype), share.log().to(target.dtype))
    return torch.logaddexp(target + kept, guide["calibrator"] + given)


def _value(
    target: Tensor, guide: Mapping[str, Tensor], layout: Layout, alpha: Strength, config: FusionConfig
) -> Tensor:
    """Target + clip(alpha log R) (NADO, Meng et al. 2022), log R relative to its expectation under the target."""
    return target + (alpha * _relative(guide["value"], target, layout)).clamp(-config.max_shift, config.max_shift)


def _give_to_others(target: Tensor, shift: Tensor, layout: Layout) -> Tensor:
    """Log of exp(target) / (nu + exp(-shift) - 1), with the nu in (0, 1] for which the sum is 1.

    Dividing by the sum alone would give a nearly certain candidate nearly all of its loss back. Of all distributions
    in which the weighted penalties are expected no oftener, this one has the least divergence from the target. Newton's
    method on 1 / sum - 1, concave in nu, begins at a lower bound (no part of the sum exceeds 1) and nears from below.
    """
    penalty = torch.expm1(-shift).clamp(max=_MAX_PENALTY)
    probability = target.exp()
    untouched = layout.sum(torch.where(penalty == 0.0, probability, 0.0))
    nu = layout.max(probability - penalty).maximum(untouched).clamp(min=_LEAST_NU)
    for _ in range(_NEWTON_STEPS):
        share = 1.0 / (nu + penalty)
        total = layout.sum(probability * share)
        slope = layout.sum(probability * share * share)
        nu = (nu + total * (total - 1.0) / slope.clamp(min=_TINY)).clamp(_LEAST_NU, 1.0)
    return target - (nu + penalty).log()


def _without_gain(before: Tensor, after: Tensor, chosen: Tensor, layout: Layout) -> Tensor:
    """The chosen candidates at what they had at most; the others share what that frees in proportion."""
    capped, probability = torch.where(chosen, torch.minimum(before, after), after), after.exp()
    others = layout.sum(torch.where(chosen, 0.0, probability))
    freed = layout.sum(probability - capped.exp())
    raised = after + (freed / others.clamp(min=_TINY)).log1p()
    return torch.where(others > _TINY, torch.where(chosen, capped, raised), after)


_OF_CONTRAST = ("candidates", "one_sided", "margin", "max_shift", "mass_to_others", *OF_VALUE_HEAD)
MODES: dict[str, Mode] = {
    "contrast": Mode(_contrast, ("calibrator", "reference"), MAX_ALPHA, options=_OF_CONTRAST),
    "geometric": Mode(_geometric, ("calibrator",), 1.0, default_alpha=0.3),
    "blend": Mode(_blend, ("calibrator",), 1.0, default_alpha=0.3),
    "value": Mode(_value, ("value",), MAX_ALPHA, options=("candidates", "max_shift")),
    "embedding": Mode(None, ("calibrator",), 1.0, default_alpha=0.1, below_max=True, options=("hidden_temperature",)),
}


def needed_heads(config: FusionConfig, parts: Sequence[Part] = ()) -> tuple[str, ...]:
    """Heads that a configuration asks of the guide, or of several in one."""
    if parts and config.mode == "contrast":
        return tuple(head for part in parts for head in part.heads)
    heads = MODES[config.mode].heads
    return (*heads, "value") if config.mode == "contrast" and config.value_weight else heads


class Moved(NamedTuple):
    """What one fusion took from some tokens and gave to others; nothing of it has been read from the device."""

    mass: Tensor  # float32 [rows over all leading axes], probability that was moved (total variation)
    rows: Tensor  # int64 [n], of the tokens that lost most
    token_ids: Tensor  # int64 [n], these tokens
    lost: Tensor  # float32 [n], the probability that each lost; may be 0

    @classmethod
    def of(
        cls,
        before: Tensor,
        after: Tensor,
        token_ids: Tensor | None = None,
        places: Tensor | None = None,
        row_count: int = 0,
    ) -> Moved:
        """From log-probabilities [..., k] of tokens [..., k] (None: the vocabulary), or as a list with their rows."""
        lost = (before.detach().exp() - after.detach().exp()).clamp(min=0.0)
        if places is not None and token_ids is not None:
            mass = lost.new_zeros(row_count).index_add_(0, places, lost)
            named = lost.topk(min(_MOST_LOWERED * row_count, len(lost))).indices
            return cls(mass, places[named], token_ids[named], lost[named])
        width = before.shape[-1]
        lost = lost.reshape(-1, width)
        most, index = lost.topk(min(_MOST_LOWERED, width), dim=-1)
        ids = index if token_ids is None else token_ids.reshape(-1, width).gather(-1, index)
        rows = torch.arange(len(lost), device=lost.device)[:, None].expand_as(ids)
        return cls(lost.sum(dim=-1), rows.flatten(), ids.flatten(), most.flatten())


def fuse(
    scores: Tensor,
    guide_scores: GuideScores,
    covers: Callable[[Tensor], Tensor],
    config: FusionConfig,
    always: Tensor | None = None,
    *,
    pick: PickedScores | None = None,
    alpha: Tensor | None = None,
    keep_scale: bool = False,
    in_place: bool = False,
    alone: Tensor | None = None,
    observe: Callable[[Moved], None] | None = None,
    protected: Tensor | None = None,
    parts: Sequence[Part] = (),
) -> Tensor:
    """Fuse next-token scores with a guide.

    Args:
        scores: float [..., target_vocab_size], logits or log-probabilities (a constant per row changes nothing). Tokens
            of probability 0 are excluded, however that is written (-inf, -1e9). Not modified.
        guide_scores: (head, token_ids int64 [..., k] or None) -> float [..., k], log-probabilities or log R up to a
            constant per row; None: of the guide's whole vocabulary, which may be wider or narrower than the scores.
        covers: token_ids int64 [...] -> bool, True where the guide knows the token.
        config: how.
        always: int64 [n], ids that are candidates whatever the target gives them, unless it excludes them.
        pick: (heads, places int64 [n], token_ids int64 [n]) -> float [n] by head, the same for a list of tokens, with
            `places` counting rows over all leading axes; saves time where rows have few candidates on a CPU.
        alpha: float [...], a strength for each row, in the range of the mode; None: that of the config.
        keep_scale: give each row the logsumexp that it had instead of 0, for processors behind that look at logits.
        in_place: allow the result of `keep_scale` to be written into `scores`.
        alone: bool [...], rows that are left as they are (for instance those of `unjudgeable`).
        observe: called once with what was done; of rows left `alone` it means nothing.
        protected: bool [the guide's vocabulary], names, which one-sided contrast never raises.
        parts: of several guides in one, whose shifts are added (`Guide.parts`); contrast only.

    Returns:
        Log-probabilities, float32, shape and device of `scores`, nats, normalised unless `keep_scale`.

    Raises:
        InputError: a mode that fuses hidden states.

    Example:
        >>> scores = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
        >>> heads = {"calibrator": scores, "reference": torch.log(torch.tensor([[0.5, 0.4, 0.1]]))}
        >>> everything = lambda ids: torch.ones_like(ids, dtype=torch.bool)
        >>> fuse(scores, lambda head, _: heads[head], everything, FusionConfig(candidates=0)).exp()
        tensor([[0.5517, 0.1724, 0.2759]])
    """
    mode = MODES[config.mode]
    if mode.fuse is None:
        raise InputError(
            f"Mode {config.mode!r} fuses hidden states, not distributions: use embedding.fusion.EmbeddingFusion."
        )
    raw = (scores if alone is None else scores.masked_fill(alone[..., None], 0.0)).float()
    is_off = alpha is None and config.alpha == 0.0
    log_sums = None
    if keep_scale and not is_off and pick is not None and raw.device.type == "cpu" and not raw.requires_grad:
        result = raw if in_place and raw.is_contiguous() else raw.clone(memory_format=torch.contiguous_format)
        log_sums = _log_sums(result)
    elif raw.device.type == "cpu" and not raw.requires_grad:
        # NumPy asks for large pages: to get the memory costs less than to fill it, not more.
        result = torch.log_softmax(raw, dim=-1, out=torch.from_numpy(np.empty(raw.shape, dtype=np.float32)))
    else:
        result = raw.log_softmax(dim=-1)
    scale = None
    if keep_scale and log_sums is None:  # the same for every token of a row, so its best one tells
        scale = raw.amax(dim=-1, keepdim=True) - result.amax(dim=-1, keepdim=True)
    if not is_off:
        result = _fuse(result, log_sums, guide_scores, covers, config, always, pick, alpha, observe, protected, parts)
    if scale is not None:
        result = result + scale
    return result if alone is None else torch.where(alone[..., None], scores.float(), result)


def _log_sums(scores: Tensor) -> Tensor:
    """Logsumexp of each row, [..., 1]; a few rows at once, since fresh memory for all costs more than the sums do."""
    rows = scores.view(-1, scores.shape[-1])
    sums, buffer = rows.new_empty(len(rows), 1), rows.new_empty(min(len(rows), _ROWS_AT_ONCE), rows.shape[1])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        log_probs = torch.log_softmax(part, dim=-1, out=buffer[: len(part)])
        sums[start : start + len(part)] = part.amax(dim=-1, keepdim=True) - log_probs.amax(dim=-1, keepdim=True)
    return sums.view(*scores.shape[:-1], 1)


def unjudgeable(scores: Tensor) -> Tensor:
    """Rows with nan or +inf, and rows that exclude every token: bool [...] for scores [..., target_vocab_size]."""
    best = scores.amax(dim=-1)  # nan where any score is
    return ~(best < torch.inf) | (best == -torch.inf)


def _fuse(
    scores: Tensor,
    log_sums: Tensor | None,
    guide_scores: GuideScores,
    covers: Callable[[Tensor], Tensor],
    config: FusionConfig,
    always: Tensor | None,
    pick: PickedScores | None,
    alpha: Tensor | None,
    observe: Callable[[Moved], None] | None,
    protected: Tensor | None,
    parts: Sequence[Part],
) -> Tensor:
    """The fusion of rows that can be judged, whose log-probabilities are `scores` (- `log_sums`).

    Writes into `scores` where autograd does not need them.
    """
    mode, vocab_size = MODES[config.mode], scores.shape[-1]
    assert mode.fuse is not None
    token_ids, values, is_candidate, places = choose_candidates(
        scores,
        config.candidates,
        always,
        as_list=pick is not None and scores.device.type == "cpu",
        log_sums=log_sums,
    )
    known = covers(torch.arange(vocab_size, device=scores.device) if token_ids is None else token_ids)
    rows = scores.numel() // vocab_size
    if places is not None and token_ids is not None:
        if not known.numpy().all():  # torch looks at every byte
            places, token_ids, values = places[known], token_ids[known], values[known]
        if not len(places):
            if observe is not None:
                observe(Moved.of(values, values, token_ids, places, rows))
            return scores
        layout: Layout = _List(places, rows)
    else:
        layout = Layout(~(known if is_candidate is None else known & is_candidate).expand_as(values))
    raw: Mapping[str, Tensor]
    heads = needed_heads(config, parts)
    if places is not None and token_ids is not None and pick is not None:
        raw = pick(heads, places, token_ids)
    else:
        raw = {head: _fit(guide_scores(head, token_ids), values.shape[-1]) for head in heads}
    mass = layout.logsumexp(values)
    target = layout.normalise(values) if places is None else values - mass
    guide = {head: each if head.startswith("value") else layout.normalise(each) for head, each in raw.items()}
    strength: Strength = config.alpha if alpha is None else layout.of_rows(alpha.to(scores.device, torch.float32))
    guide, target = _as_one(guide, parts, target, layout, strength)
    fused = layout.normalise(mode.fuse(target, guide, layout, strength, config)) + mass
    if protected is not None and config.mode == "contrast" and config.one_sided:
        fused = _without_gain(values, fused, _chosen(protected, token_ids, vocab_size), layout)
    if layout.fixed is not None:
        fused = torch.where(layout.fixed, values, fused)
    if observe is not None:
        observe(Moved.of(values, fused, token_ids, places, rows))
    if log_sums is not None:
        fused = fused + (log_sums if places is None else layout.of_rows(log_sums))
    if token_ids is None:
        return fused
    if places is None:
        return (scores.scatter if scores.requires_grad else scores.scatter_)(-1, token_ids, fused)
    flat = scores.reshape(-1)
    flat = (flat.index_copy if scores.requires_grad else flat.index_copy_)(0, places * vocab_size + token_ids, fused)
    return flat.view(scores.shape)


def _chosen(among: Tensor, token_ids: Tensor | None, vocab_size: int) -> Tensor:
    """Of a mask over the guide's vocabulary, the entries of the candidates."""
    return _fit(among, vocab_size) if token_ids is None else among[token_ids.clamp(max=len(among) - 1)]


def _fit(guide_scores: Tensor, width: int) -> Tensor:
    missing = width - guide_scores.shape[-1]
    return functional.pad(guide_scores, (0, missing)) if missing else guide_scores  # a negative pad cuts
