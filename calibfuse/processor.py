"""CalibFusion: the fusion as a transformers LogitsProcessor. The only file that knows `generate()`'s protocol.

Facts it rests on (transformers 4.57 and 5.x): the call gets the whole `input_ids`, with left padding and finished rows,
and float scores that are raw logits in sampling and log-probabilities in beam search; they may hold -inf from earlier
processors and must not be written to; temperature, top-k and top-p come after. Nothing marks the start of a generation
and beams are reordered silently, so all state derives from `input_ids` (see prefix_cache.py).
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from calibfuse.account import Account, Ledger, Report
from calibfuse.calibrator import Calibrator
from calibfuse.calibrator.word_bias import LOWERED, PROTECTED
from calibfuse.embedding.alignment import Alignment, alignable, alignment_folders, find_alignment, last_states
from calibfuse.embedding.fusion import EmbeddingFusion
from calibfuse.embedding.output_head import find_output_head
from calibfuse.errors import (
    CalibfuseError,
    FusionNotAppliedError,
    InputError,
    MissingHeadError,
    VocabularyMismatchError,
)
from calibfuse.fusion import MODES, FusionConfig, Moved, fuse, needed_heads, recommended_config, unjudgeable
from calibfuse.guide import Guide, NextTokenScores
from calibfuse.hub import resolve_checkpoint
from calibfuse.prefix_cache import RowSession
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

_SEQUENCE_CHUNK = 8_000_000  # scores fused at once in fuse_logits: 32 MB for each intermediate result


class CalibFusion(LogitsProcessor):
    """Fuses a guide into generation.

    One object serves any number of `generate()` calls, batches and beams; several objects can be used at once.

    Args:
        guide: a calibrator bound to the target's vocabulary.
        config: how to fuse; None: as the guide recommends.
        alignment: of the guide with the target; for mode "embedding" only.
        target: the target model, whose output head mode "embedding" uses. Otherwise it only tells how wide the target's
            scores are, by which those of an assistant with another tokenizer are known.
        on_step: gets the report of each step, over all rows, as it is taken; for those who stream.

    Raises:
        MissingHeadError: the mode needs a head or an alignment that is not there.
        InputError: mode "embedding" without a target, or with one whose output head it cannot use.
        VocabularyMismatchError: the alignment does not fit the guide or the target.

    Example:
        fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)
        model.generate(**inputs, logits_processor=[fusion])
    """

    # Continuous batching shows a processor one token per request and no request identity: no guide with a history can
    # work there. transformers drops processors that say so, with a warning.
    supports_continuous_batching = False

    def __init__(
        self,
        guide: Guide,
        config: FusionConfig | None = None,
        *,
        alignment: Alignment | None = None,
        target: PreTrainedModel | None = None,
        on_step: Callable[[Report], None] | None = None,
    ) -> None:
        self.guide = guide
        self.on_step = on_step
        self._account, self._ledger = Account(), Ledger()
        self.config = recommended_config(guide.recommended, {}) if config is None else config
        self._check_heads()
        if self.config.mode == "blend":
            warnings.warn(
                "Mode 'blend' is deprecated and goes in the next version, since it flattens the text; use 'contrast', "
                "or 'geometric' for a mixture.",
                FutureWarning,
                stacklevel=2,
            )
        # Held only where its output head is used: a copy of this object would copy the model.
        self._alignment, self._target = alignment, target if MODES[self.config.mode].fuse is None else None
        self._embedding = self._embedding_fusion()
        self._calls = self._fused = 0
        self._warned: set[str] = set()
        self._target_width = _head_width(target)
        if self._target_width is not None and (problem := _misfit(guide, self._target_width)):
            raise VocabularyMismatchError(f"{problem} Pass the target's own tokenizer.")
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        target: PreTrainedModel | None = None,
        alpha: float | None = None,
        mode: str | None = None,
        reference: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        local_files_only: bool = False,
        on_step: Callable[[Report], None] | None = None,
        **fusion_options: Any,  # noqa: ANN401
    ) -> CalibFusion:
        """Load a calibrator and bind it to a target.

        Args:
            name_or_path: Hub id or local folder of a calibrator; None: the bundled one.
            tokenizer: the target's tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer`, a name or a path.
            target: the target model; gives the tokenizer's name when `tokenizer` is missing, and its output head in
                mode "embedding".
            alpha: strength; None: what the calibrator recommends.
            mode: of fusion; None: what the calibrator recommends.
            reference: where the calibrator is a causal LM of transformers, its reference model for mode "contrast".
            revision: of the calibrator on the Hub.
            device: of the calibrator; default the target's, else CPU. It follows the scores in any case.
            dtype: of the bound token vectors, as torch or as a string; bfloat16 halves their memory.
            local_files_only: never touch the network.
            on_step: see the class.
            **fusion_options: other fields of FusionConfig.

        Returns:
            The processor.

        Raises:
            InputError: neither `tokenizer` nor a `target` that knows its tokenizer, or an option is out of range.
            CheckpointError: no such calibrator, or a damaged one.
            VocabularyError: the tokenizer is not usable.
            MissingHeadError: the mode needs a head that the calibrator has not, or (embedding) an alignment with this
                target that `calibfuse align-embedding` has not made yet.
        """
        if target is not None and not isinstance(target, torch.nn.Module):
            raise InputError(
                f"target= must be the model itself, got a {type(target).__name__}; a tokenizer, a name or a path goes "
                "to tokenizer=."
            )
        if name_or_path is not None and not isinstance(name_or_path, str | os.PathLike):
            raise InputError(
                f"The first argument names the calibrator, got a {type(name_or_path).__name__}; a tokenizer goes to "
                "tokenizer=, a model to target=."
            )
        source = tokenizer if tokenizer is not None else _tokenizer_name(target)
        options: dict[str, Any] = {key: value for key, value in (("alpha", alpha), ("mode", mode)) if value is not None}
        options.update(fusion_options)
        FusionConfig.from_dict(options)  # bad options fail before anything is loaded
        calibrator = Calibrator.from_pretrained(
            name_or_path, reference=reference, revision=revision, local_files_only=local_files_only
        )
        if device is None and target is not None and target.device.type != "meta":  # offloaded: follow the scores
            device = target.device
        if local_files_only and isinstance(source, str) and not os.path.exists(os.path.expanduser(source)):
            source = Vocabulary.from_tokenizer(source, local_files_only=True)  # a Hub id, which `bind` would ask for
        guide = calibrator.bind(source, dtype=dtype, device=device)
        config = recommended_config(guide.recommended, options)
        alignment = None
        if MODES[config.mode].fuse is None and target is not None:
            # In the Hub's cache by now.
            folder = resolve_checkpoint(name_or_path, revision=revision, local_files_only=True)
            folders = alignment_folders(folder, calibrator.fingerprint)
            alignment = find_alignment(folders, guide, target, calibrator=str(name_or_path or "CALIBRATOR"))
        if reference is None and name_or_path is not None and str(name_or_path) in _names_of(tokenizer, target):
            warnings.warn(
                f"The calibrator {str(name_or_path)!r} is the target itself: a model cannot correct itself. Leave the "
                "name out for the bundled calibrator.",
                UserWarning,
                stacklevel=2,
            )
        return cls(guide, config, alignment=alignment, target=target, on_step=on_step)

    @property
    def calls(self) -> int:
        """How often the processor was called; `fuse_logits` counts as one call."""
        return self._calls

    @property
    def alpha(self) -> float:
        """The strength; may be set."""
        return self.config.alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.set(alpha=alpha)

    def set(self, **options: Any) -> CalibFusion:  # noqa: ANN401
        """Change options of the fusion; what has been followed so far stays of use.

        Args:
            **options: fields of FusionConfig. With another mode, the others are those that the guide recommends for it.

        Returns:
            This object.

        Raises:
            InputError: an unknown option, or a value out of range.
            MissingHeadError: the mode needs a head or an alignment that is not there.
        """
        if options.get("mode", self.config.mode) == self.config.mode:
            config = recommended_config(self.config.to_dict(), options)
        else:
            config = recommended_config(self.guide.recommended, options)
        former, self.config = self.config, config
        try:
            self._check_heads()
            self._embedding = self._embedding_fusion()
        except CalibfuseError:
            self.config = former
            raise
        return self

    def __repr__(self) -> str:
        """Mode, strength and calibrator."""
        options = "".join(f", {name}={getattr(self.config, name)!r}" for name in MODES[self.config.mode].options)
        return (
            f"{type(self).__name__}(mode={self.config.mode!r}, alpha={self.config.alpha:g}{options}, "
            f"guide={type(self.guide).__name__}, vocabulary={self.guide.vocabulary.name!r})"
        )

    def add_words(self, words: Iterable[str], bias: float = LOWERED) -> CalibFusion:
        """Lower further words, in whatever pieces the target spells them.

        Args:
            words: of letters a to z; one, or several.
            bias: in nats, below 0; before the strength is applied.

        Returns:
            This object.

        Raises:
            InputError: a word of other characters, or a guide that is no universal calibrator.
        """
        return self._with_words(words, -abs(bias))

    def protect_names(self, names: Iterable[str], bias: float = PROTECTED) -> CalibFusion:
        """Give names of people or groups back what the calibrator may take from them; see `add_words`."""
        return self._with_words(names, abs(bias))

    def _with_words(self, words: Iterable[str], bias: float) -> CalibFusion:
        listed = [words] if isinstance(words, str) else list(words)
        if not all(isinstance(word, str) for word in listed):
            raise InputError(f"Expected words as strings, got {listed!r}.")
        calibrator = self.guide.calibrator
        if not isinstance(calibrator, Calibrator):
            raise InputError(f"Words are a part of universal calibrators, and this is a {type(calibrator).__name__}.")
        with_words = calibrator.with_words(dict.fromkeys(map(str.lower, listed), bias))
        self.guide = with_words.bind(self.guide.vocabulary, device=self.guide.device)
        return self

    def reset(self) -> None:
        """Forget the generations followed so far (frees their cache). Never needed for correctness."""
        self._of_thread = threading.local()

    def _rows(self, guide: Guide) -> RowSession:
        """The session of this thread: a generation runs in one, and several may share this object."""
        rows: RowSession | None = getattr(self._of_thread, "rows", None)
        if rows is None or rows.guide is not guide:
            rows = self._of_thread.rows = RowSession(guide)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows generations of its own."""
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_of_thread", "_account", "_ledger")
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        self._account, self._ledger = Account(), Ledger()
        self.reset()

    def report(self, *, mask: Callable[[str], str] | None = None) -> Report:
        """What was done in all steps so far (`fuse_logits` takes none).

        Args:
            mask: how the tokens that lost most are written; None: all letters but the first as stars.

        Example:
            >>> print(fusion.report())  # doctest: +SKIP
            40 steps, 12 touched, 1.9% of the probability moved; most lowered: 'b****' -0.321, 's***' -0.104
        """
        self._ledger.settle()
        return self._account.report(self.guide.vocabulary, mask=mask)

    @contextmanager
    def required(self) -> Iterator[CalibFusion]:
        """Raise if the block finishes without one call of this processor.

        Some engines accept `logits_processor` and drop it silently (`generate_batch`, `cache_implementation="paged"`).

        Raises:
            FusionNotAppliedError: on leaving the block.
        """
        before = self._fused
        yield self
        if self._fused == before:
            raise FusionNotAppliedError(
                "The generation finished without calling CalibFusion: the engine dropped `logits_processor`, and the "
                "text is the plain model's. Use model.generate() without continuous batching or a paged cache."
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One decoding step.

        Args:
            input_ids: int64 [rows, length], whole sequences, left padding included.
            scores: float [rows, target_vocab_size], logits or log-probabilities; not modified.

        Returns:
            Normalised log-probabilities, float32 [rows, target_vocab_size], nats; -inf stays -inf.

        Raises:
            VocabularyMismatchError: shapes do not fit, or ids lie outside the scores' and the tokenizer's vocabulary.
            InputError: scores hold nan or +inf.
        """
        if torch.compiler.is_compiling():  # host and device take turns here: nothing for a graph
            result: Tensor = torch.compiler.disable(self._step)(input_ids, scores)  # type: ignore[no-untyped-call]
            return result
        return self._step(input_ids, scores)

    def _step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `__call__`."""
        if input_ids.ndim != 2 or scores.ndim != 2 or input_ids.shape[0] != scores.shape[0]:
            raise VocabularyMismatchError(
                "Expected input_ids [rows, length] and scores [rows, vocabulary] with equal rows, got "
                f"{tuple(input_ids.shape)} and {tuple(scores.shape)}."
            )
        self._calls += 1
        if scores.shape[0] == 0 or self._is_foreign(scores.shape[-1]):
            return scores.float()
        self._fused += 1
        if input_ids.shape[1] == 0:
            self._warn(
                "The generation begins without token ids (inputs_embeds): the calibrator does not see the prompt, and "
                "judges the continuation alone."
            )
        guide = self._follow(scores.device)
        input_ids = input_ids.to(scores.device)
        readings = self._readings(input_ids, scores)
        if self.config.alpha == 0.0:
            said, values = None, readings.tolist()
        else:
            said, values = self._rows(guide).step(input_ids, readings)
        has_dead_rows = self._check(values, scores)
        if self.on_step is None:
            return self._fuse(guide, scores, said, has_dead_rows, self._account)
        step = Account()
        fused = self._fuse(guide, scores, said, has_dead_rows, step)
        self._ledger.settle()
        self._account.add(step)
        self.on_step(step.report(guide.vocabulary))
        return fused

    def fuse_logits(self, input_ids: Tensor, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Fuse whole sequences: perplexity, log-likelihood tasks, training targets.

        Args:
            input_ids: int64 [batch, length].
            logits: float [batch, length, target_vocab_size]; position i scores token i + 1. Not modified.
            attention_mask: [batch, length], 0 for left padding; only needed where padding is not a special token.

        Returns:
            Normalised log-probabilities, float32, shape of `logits`; what step-wise calls give at every position.

        Raises:
            VocabularyMismatchError: shapes do not fit, or ids lie outside the logits' and the tokenizer's vocabulary.
            InputError: logits hold nan or +inf.
        """
        if input_ids.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
            raise VocabularyMismatchError(
                "Expected input_ids [batch, length] and logits [batch, length, vocabulary], got "
                f"{tuple(input_ids.shape)} and {tuple(logits.shape)}."
            )
        self._calls += 1
        self._fused += 1
        guide = self._follow(logits.device)
        if not logits.numel():
            return logits.float()
        input_ids = input_ids.to(logits.device)
        has_dead_rows = self._check(self._readings(input_ids, logits).tolist(), logits)
        if self.config.alpha == 0.0:
            return self._fuse(guide, logits, None, has_dead_rows)
        said = guide.sequence(input_ids, attention_mask)
        batch, length, vocab_size = logits.shape
        step = max(1, _SEQUENCE_CHUNK // (batch * vocab_size))
        parts = [
            self._fuse(guide, logits[:, start : start + step], said.positions(start, start + step), has_dead_rows)
            for start in range(0, length, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _fuse(
        self,
        guide: Guide,
        scores: Tensor,
        said: NextTokenScores | None,
        has_dead_rows: bool,
        account: Account | None = None,
    ) -> Tensor:
        """Fuse; rows that exclude every token are left as they are (dead beams of a constraint)."""
        alone = unjudgeable(scores) if has_dead_rows else None

        def observe(moved: Moved) -> None:
            if account is not None:
                self._ledger.enter([account] * scores.shape[0], moved, alone)

        if said is None or self._embedding is not None:
            raw = scores if alone is None else scores.masked_fill(alone[..., None], 0.0)
            fused = raw.float().log_softmax(-1) if said is None else self._embedding(raw, last_states(said))  # type: ignore[misc]
            if account is not None:
                observe(Moved.of(raw.float().log_softmax(-1), fused))
            return fused if alone is None else torch.where(alone[..., None], scores.float(), fused)
        always = guide.always_candidates(scores.shape[-1])
        return fuse(
            scores, said.log_scores, guide.covers, self.config, always, pick=said.log_scores_at, alone=alone,
            observe=observe if account is not None else None,
        )  # fmt: skip

    def _check_heads(self) -> None:
        missing = [head for head in needed_heads(self.config) if head not in self.guide.heads]
        if missing:
            raise MissingHeadError(
                f"Mode {self.config.mode!r} needs the head {missing[0]!r}, but the calibrator has only "
                f"{', '.join(map(repr, self.guide.heads))}. Choose another mode or a calibrator trained with that head."
            )

    def _embedding_fusion(self) -> EmbeddingFusion | None:
        """What mode "embedding" needs beside the guide; None in other modes."""
        config, target = self.config, self._target
        if MODES[config.mode].fuse is not None:
            return None
        if target is None:
            raise InputError(
                f"Mode {config.mode!r} decodes through the target's own output head: pass target= (the model)."
            )
        if self._alignment is None:
            raise MissingHeadError(
                f"Mode {config.mode!r} needs an alignment of the calibrator with the target: pass alignment=, or use "
                "CalibFusion.from_pretrained, which finds the one that `calibfuse align --target` made."
            )
        self._alignment.check(alignable(self.guide))
        return EmbeddingFusion(
            self._alignment.matrix, find_output_head(target), config.alpha, config.hidden_temperature
        )

    def _is_foreign(self, width: int) -> bool:
        """Whether scores are those of another model than the target: an assistant with a tokenizer of its own."""
        if self._embedding is not None:
            return False
        if self._target_width is not None:
            return width != self._target_width
        problem = _misfit(self.guide, width)
        if problem:
            self._warn(
                f"{problem} Such scores are left as they are: pass target= (the model) if they are an assistant's, and "
                "the right tokenizer= if they are the target's."
            )
        return bool(problem)

    def _warn(self, message: str) -> None:
        """Warn once of each thing."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=5)

    def _readings(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `_check` judges, float32 [4] on the device: lowest and highest best score, lowest and highest id."""
        # The maximum of a row is nan where any score is, and -inf where all are: one reduction for both checks.
        best = scores.amax(dim=-1).float()
        ids = input_ids if input_ids.numel() else best.new_zeros(1)
        return torch.stack([best.amin(), best.amax(), ids.amin(), ids.amax()])

    def _follow(self, device: torch.device) -> Guide:
        """The guide, moved to the scores' device the first time they differ."""
        guide = self.guide
        if guide.device != device:
            guide = self.guide = guide.to(device)
        return guide

    def _check(self, readings: list[float], scores: Tensor) -> bool:
        """Refuse what cannot be fused; whether a row excludes every token."""
        lowest, highest, first_id, last_id = readings
        if not highest < math.inf:
            raise InputError(
                "The target model's scores hold nan or +inf; its forward pass failed (overflow in half precision?)."
            )
        # A prompt may hold ids beyond the head (image marks) as long as the tokenizer has them.
        limit = max(scores.shape[-1], self.guide.target_vocab_size)
        if first_id < 0 or last_id >= limit:
            raise VocabularyMismatchError(
                f"input_ids hold {int(first_id if first_id < 0 else last_id)}, outside the {scores.shape[-1]} ids "
                f"of the scores and the {self.guide.target_vocab_size} of the tokenizer. Do ids, scores and tokenizer "
                "belong to the same model?"
            )
        return lowest == -math.inf


def _misfit(guide: Guide, width: int) -> str:
    """Why a head of `width` scores cannot be that of the guide's tokenizer; empty where it can.

    Heads are padded, by up to 2 % in models that are known, and some leave out a few tokens at the end (image marks).
    """
    size = guide.target_vocab_size
    beyond = size - width
    if beyond > 0:
        beyond = int((~guide.vocabulary.is_special[width:]).sum())
    if beyond <= max(256, size // 100) and width <= size + max(4096, size // 10):
        return ""
    return (
        f"The scores have {width} entries, which cannot be those of the tokenizer {guide.vocabulary.name!r} "
        f"with {size} ids."
    )


def _names_of(*things: object) -> set[str]:
    """Where a tokenizer or a model says that it was loaded from."""
    names = {each if isinstance(each, str) else getattr(each, "name_or_path", None) for each in things}
    return {str(name) for name in names if name}


def _head_width(target: PreTrainedModel | None) -> int | None:
    """How many scores a model gives; None where it does not say."""
    head: Any = getattr(target, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _tokenizer_name(target: PreTrainedModel | None) -> str:
    if target is None:
        raise InputError(
            "CalibFusion needs the target's vocabulary: pass tokenizer= (a tokenizer, a name or a path) or target= "
            "(the model)."
        )
    name = getattr(target, "name_or_path", "") or getattr(target.config, "_name_or_path", "")
    if not name:
        raise InputError(
            f"The target model ({type(target).__name__}) does not know where it was loaded from, so its tokenizer "
            "cannot be found: pass tokenizer= as well."
        )
    return str(name)
