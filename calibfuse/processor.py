"""CalibFusion: the fusion as a transformers LogitsProcessor. The only file that knows `generate()`'s protocol.

Facts it rests on (transformers 4.57 and 5.x): the call gets the whole `input_ids`, with left padding and finished rows,
and float scores that are raw logits in sampling and log-probabilities in beam search; they may hold -inf from earlier
processors and must not be written to; temperature, top-k and top-p come after. Nothing marks the start of a generation
and beams are reordered silently, so all state derives from `input_ids` (see prefix_cache.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from calibfuse.calibrator import Calibrator, Guide
from calibfuse.errors import FusionNotAppliedError, InputError, MissingHeadError, VocabularyMismatchError
from calibfuse.fusion import MODES, FusionConfig, fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

_SEQUENCE_CHUNK = 16_000_000  # scores fused at once in fuse_logits


class CalibFusion(LogitsProcessor):
    """Fuses a guide into generation.

    One object serves any number of `generate()` calls, batches and beams; several objects can be used at once.

    Args:
        guide: a calibrator bound to the target's vocabulary.
        config: how to fuse.

    Example:
        fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)
        model.generate(**inputs, logits_processor=[fusion])
    """

    # Continuous batching shows a processor one token per request and no request identity: no guide with a history can
    # work there. transformers drops processors that say so, with a warning.
    supports_continuous_batching = False

    def __init__(self, guide: Guide, config: FusionConfig | None = None) -> None:
        self.guide = guide
        self.config = config or FusionConfig()
        missing = [head for head in MODES[self.config.mode].heads if head not in guide.heads]
        if missing:
            raise MissingHeadError(
                f"Mode {self.config.mode!r} needs the head {missing[0]!r}, but the calibrator has only "
                f"{', '.join(map(repr, guide.heads))}. Choose another mode or a calibrator trained with that head."
            )
        self._session = guide.session()
        self._calls = 0

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        target: PreTrainedModel | None = None,
        alpha: float | None = None,
        mode: str | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        **fusion_options: Any,
    ) -> CalibFusion:
        """Load a calibrator and bind it to a target.

        Args:
            name_or_path: Hub id or local folder of a calibrator; None: the bundled one.
            tokenizer: the target's tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer`, a name or a path.
            target: the target model; gives the tokenizer's name when `tokenizer` is missing.
            alpha: strength; None: what the calibrator recommends.
            mode: of fusion; None: what the calibrator recommends.
            revision: of the calibrator on the Hub.
            device: of the calibrator; default the target's, else CPU. It follows the scores in any case.
            dtype: of the bound token vectors; bfloat16 halves their memory.
            local_files_only: never touch the network.
            **fusion_options: other fields of FusionConfig.

        Returns:
            The processor.

        Raises:
            InputError: neither `tokenizer` nor a `target` that knows its tokenizer, or an option is out of range.
            CheckpointError: no such calibrator, or a damaged one.
            VocabularyError: the tokenizer is not usable.
            MissingHeadError: the mode needs a head that the calibrator has not.
        """
        source = tokenizer if tokenizer is not None else _tokenizer_name(target)
        options: dict[str, Any] = {key: value for key, value in (("alpha", alpha), ("mode", mode)) if value is not None}
        options.update(fusion_options)
        FusionConfig.from_dict(options)  # bad options fail before anything is loaded
        calibrator = Calibrator.from_pretrained(name_or_path, revision=revision, local_files_only=local_files_only)
        if device is None and target is not None:
            device = target.device
        guide = calibrator.bind(source, dtype=dtype, device=device)
        return cls(guide, recommended_config(calibrator.config.fusion, options))

    @property
    def calls(self) -> int:
        """How often the processor was called; `fuse_logits` counts as one call."""
        return self._calls

    def reset(self) -> None:
        """Forget the generations followed so far (frees their cache). Never needed for correctness."""
        self._session = self.guide.session()

    @contextmanager
    def required(self) -> Iterator[CalibFusion]:
        """Raise if the block finishes without one call of this processor.

        Some engines accept `logits_processor` and drop it silently (`generate_batch`, `cache_implementation="paged"`).

        Raises:
            FusionNotAppliedError: on leaving the block.
        """
        before = self._calls
        yield self
        if self._calls == before:
            raise FusionNotAppliedError(
                "The generation finished without calling CalibFusion: the engine dropped `logits_processor`, and the text "
                "is the plain model's. Use model.generate() without continuous batching or a paged cache."
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One decoding step.

        Args:
            input_ids: int64 [rows, length], whole sequences, left padding included.
            scores: float [rows, target_vocab_size], logits or log-probabilities; not modified.

        Returns:
            Normalised log-probabilities, float32 [rows, target_vocab_size], nats; -inf stays -inf.

        Raises:
            VocabularyMismatchError: shapes do not fit, or ids lie outside the scores' vocabulary.
            InputError: scores hold nan, or a row excludes every token.
        """
        if input_ids.ndim != 2 or scores.ndim != 2 or input_ids.shape[0] != scores.shape[0]:
            raise VocabularyMismatchError(
                "Expected input_ids [rows, length] and scores [rows, vocabulary] with equal rows, got "
                f"{tuple(input_ids.shape)} and {tuple(scores.shape)}."
            )
        self._calls += 1
        if scores.shape[0] == 0:
            return scores.float()
        self._follow(scores.device)
        # The maximum of a row is nan where any score is, and -inf where all are: one reduction for both checks.
        best = scores.amax(dim=-1)
        newest = input_ids[:, -1:]
        flags = torch.stack(
            [
                best.isnan().any(),
                (best == -torch.inf).any(),
                ((newest < 0) | (newest >= scores.shape[-1])).any(),
            ]
        )
        if self.config.alpha == 0.0:
            self._check(flags.tolist(), input_ids, scores)
            return scores.float().log_softmax(dim=-1)
        next_tokens, values = self._session.step(input_ids, flags)
        self._check(values, input_ids, scores)
        return fuse(scores, next_tokens.log_scores, self.guide.covers, self.config)

    def fuse_logits(self, input_ids: Tensor, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Fuse whole sequences: perplexity, log-likelihood tasks, training targets.

        Args:
            input_ids: int64 [batch, length].
            logits: float [batch, length, target_vocab_size]; position i scores token i + 1. Not modified.
            attention_mask: [batch, length], 0 for left padding; only needed where padding is not a special token.

        Returns:
            Normalised log-probabilities, float32, shape of `logits`; what step-wise calls give at every position.

        Raises:
            VocabularyMismatchError: shapes do not fit, or ids lie outside the logits' vocabulary.
            InputError: logits hold nan, or a position excludes every token.
        """
        if input_ids.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
            raise VocabularyMismatchError(
                "Expected input_ids [batch, length] and logits [batch, length, vocabulary], got "
                f"{tuple(input_ids.shape)} and {tuple(logits.shape)}."
            )
        self._calls += 1
        self._follow(logits.device)
        best = logits.amax(dim=-1)
        outside = (input_ids < 0) | (input_ids >= logits.shape[-1])
        flags = [bool(best.isnan().any()), bool((best == -torch.inf).any()), bool(outside.any())]
        self._check(flags, input_ids, logits)
        if self.config.alpha == 0.0:
            return logits.float().log_softmax(dim=-1)
        said = self.guide.sequence(input_ids, attention_mask)
        if logits.numel() <= _SEQUENCE_CHUNK or logits.shape[0] == 1:
            return fuse(logits, said.log_scores, self.guide.covers, self.config)
        halves = logits.shape[0] // 2
        return torch.cat(
            [
                self.fuse_logits(input_ids[part], logits[part], None if attention_mask is None else attention_mask[part])
                for part in (slice(0, halves), slice(halves, None))
            ]
        )

    def _follow(self, device: torch.device) -> None:
        """Move the guide to the scores' device the first time they differ."""
        if self.guide.device != device:
            self.guide = self.guide.to(device)
            self._session = self.guide.session()

    @staticmethod
    def _check(flags: list[bool], input_ids: Tensor, scores: Tensor) -> None:
        has_nan, excludes_all, outside = flags
        if has_nan:
            raise InputError("The target model's scores hold nan; its forward pass failed (overflow in half precision?).")
        if excludes_all:
            raise InputError(
                "A row of the target model's scores is -inf everywhere: the processors before CalibFusion excluded every "
                "token, so there is nothing to choose from."
            )
        if outside:
            raise VocabularyMismatchError(
                f"input_ids hold {int(input_ids.max())} (lowest {int(input_ids.min())}), outside the {scores.shape[-1]} ids "
                "of the scores. Do ids and scores come from the same model?"
            )


def recommended_config(recommended: Any, options: dict[str, Any]) -> FusionConfig:
    """A calibrator's recommended options, overridden by the user's.

    A recommendation belongs to its mode: when the user asks for another mode, only the user's options count.
    """
    if "mode" in options and options["mode"] != recommended.get("mode", FusionConfig.mode):
        defaults: dict[str, Any] = {"alpha": 0.3} if MODES[options["mode"]].max_alpha == 1.0 else {}
        return FusionConfig.from_dict({**defaults, **options})
    return FusionConfig.from_dict({**recommended, **options})


def _tokenizer_name(target: PreTrainedModel | None) -> str:
    if target is None:
        raise InputError(
            "CalibFusion needs the target's vocabulary: pass tokenizer= (a tokenizer, a name or a path) or target= (the "
            "model)."
        )
    name = getattr(target, "name_or_path", "") or getattr(target.config, "_name_or_path", "")
    if not name:
        raise InputError(
            f"The target model ({type(target).__name__}) does not know where it was loaded from, so its tokenizer cannot be "
            "found: pass tokenizer= as well."
        )
    return str(name)
