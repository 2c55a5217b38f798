"""CalibFusion: the fusion as a transformers LogitsProcessor. The only file that knows `generate()`'s protocol.

Nothing marks the start of a generation and beams are reordered silently: all state derives from the ids.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from calibfuse.account import Account, Ledger, Report
from calibfuse.calibrator import BoundCalibrator, Calibrator
from calibfuse.calibrator.word_bias import LOWERED, PROTECTED
from calibfuse.embedding.alignment import Alignment, alignable, alignment_folders, find_alignment, last_states
from calibfuse.embedding.fusion import EmbeddingFusion
from calibfuse.embedding.output_head import find_output_head
from calibfuse.errors import (
    FusionNotAppliedError,
    InputError,
    MissingHeadError,
    VocabularyError,
    VocabularyMismatchError,
)
from calibfuse.fusion import MODES, FusionConfig, Moved, fuse, needed_heads, recommended_config, unjudgeable
from calibfuse.guide import Guide, NextTokenScores, Part
from calibfuse.guides.combined import CombinedGuide
from calibfuse.hub import check_tokenizer, resolve_checkpoint
from calibfuse.prefix_cache import RowSession
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

_SEQUENCE_CHUNK = 8_000_000  # scores fused at once in fuse_logits: 32 MB for each intermediate result
_OTHER_VOCABULARY = 0.01  # share of the ids with other bytes from which two tokenizers count as different


class CalibFusion(LogitsProcessor):
    """Fuses a guide into generation; one object serves any number of `generate()` calls, batches and beams.

    Args:
        guide: a calibrator bound to the target's vocabulary.
        config: how to fuse; None: as the guide recommends.
        alignment: of the guide with the target; for mode "embedding" only.
        target: the target model, whose output head mode "embedding" uses and whose width tells an assistant's scores.
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
        self.config = recommended_config(guide.recommended, {}) if config is None else config
        if self.config.mode == "blend":
            warnings.warn(
                "Mode 'blend' is deprecated and goes in the next version, since it flattens the text; use 'contrast', "
                "or 'geometric' for a mixture.",
                FutureWarning,
                stacklevel=2,
            )
        # Held only where its output head is used: a copy of this object would copy the model.
        self._alignment, self._target = alignment, target if MODES[self.config.mode].fuse is None else None
        self._embedding = self._prepare(self.config)
        self._calls = self._fused = 0
        self._warned: set[str] = set()
        self._target_width = _head_width(target)
        if self._target_width is not None and (problem := guide.misfit(self._target_width)):
            raise VocabularyMismatchError(f"{problem} Pass the target's own tokenizer.")
        self._account, self._ledger = Account(), Ledger()
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        target: PreTrainedModel | str | os.PathLike[str] | None = None,
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
                mode "embedding". Its name or path will do where the head is not needed.
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
            MissingHeadError: the mode needs a head that the calibrator does not have, or (embedding) an alignment with
                this target that `calibfuse align-embedding` has not made yet.
        """
        if isinstance(target, str | os.PathLike):
            tokenizer, target = (target if tokenizer is None else tokenizer), None
        if target is not None and not isinstance(target, torch.nn.Module):
            raise InputError(
                f"target= must be the model itself, its name or its path, got a {type(target).__name__}; a tokenizer "
                "goes to tokenizer=."
            )
        if name_or_path is not None and not isinstance(name_or_path, str | os.PathLike):
            raise InputError(
                f"The first argument names the calibrator, got a {type(name_or_path).__name__}; a tokenizer goes to "
                "tokenizer=, a model to target=."
            )
        given = {"alpha": alpha, "mode": mode}
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None} | fusion_options
        FusionConfig.from_dict(options)  # bad options fail before anything is loaded
        source = tokenizer if tokenizer is not None else _tokenizer_name(target)
        calibrator = Calibrator.from_pretrained(
            name_or_path, reference=reference, revision=revision, local_files_only=local_files_only
        )
        if device is None and target is not None and target.device.type != "meta":  # offloaded: follow the scores
            device = target.device
        if isinstance(source, str) and not os.path.exists(os.path.expanduser(source)):  # a Hub id
            if local_files_only:
                source = Vocabulary.from_tokenizer(source, local_files_only=True)  # `bind` would ask for it
            else:
                check_tokenizer(source)  # once: the Hub's client tries again and again where it is not reached
        guide = calibrator.bind(source, dtype=dtype, device=device)
        config = recommended_config(guide.recommended, options)
        alignment = None
        if MODES[config.mode].fuse is None and target is not None:
            # In the Hub's cache by now.
            folder = resolve_checkpoint(name_or_path, revision=revision, local_files_only=True)
            folders = alignment_folders(folder, calibrator.fingerprint)
            alignment = find_alignment(folders, guide, target, calibrator=str(name_or_path or "CALIBRATOR"))
        names = [name for name in (_name_of(tokenizer), _name_of(target)) if name]
        if reference is None and name_or_path is not None and str(name_or_path) in names:
            warnings.warn(
                f"The calibrator {str(name_or_path)!r} is the target itself: a model cannot correct itself. Leave the "
                "name out for the bundled calibrator.",
                UserWarning,
                stacklevel=2,
            )
        if tokenizer is not None and target is not None and _has_other_tokenizer(guide, tokenizer, target):
            warnings.warn(
                f"The tokenizer {guide.vocabulary.name!r} is not that of the target {_name_of(target)!r}: they spell "
                "the same ids differently, so the calibrator would judge other words. Pass the target's own tokenizer.",
                UserWarning,
                stacklevel=2,
            )
        return cls(guide, config, alignment=alignment, target=target, on_step=on_step)

    @classmethod
    def combine(cls, fusions: Sequence[CalibFusion], *, on_step: Callable[[Report], None] | None = None) -> CalibFusion:
        """Several calibrators in one processor: what each would add to a token's score is added up.

        Args:
            fusions: of the same target, in mode "contrast". Each counts with its own alpha, margin, one_sided and
                value_weight; the sum is bounded by the largest max_shift, and the widest choice of candidates holds.
            on_step: see the class.

        Raises:
            InputError: no fusion, or one in another mode.
            MissingHeadError: one that is itself a combination.
            VocabularyMismatchError: their tokenizers differ.

        Example:
            fusion = CalibFusion.combine([
                CalibFusion.from_pretrained(tokenizer=tokenizer),
                CalibFusion.from_pretrained("./polite", tokenizer=tokenizer, alpha=2.0),
            ])
        """
        configs = [fusion.config for fusion in fusions]
        if not configs or any(config.mode != "contrast" for config in configs):
            raise InputError(
                f"Only fusions in mode 'contrast' can be combined, got {', '.join(map(repr, fusions)) or 'none'}."
            )
        counts = [config.candidates for config in configs]
        config = FusionConfig(
            candidates=0 if 0 in counts else None if None in counts else max(count or 0 for count in counts),
            one_sided=all(config.one_sided for config in configs),
            max_shift=max(config.max_shift for config in configs),
            mass_to_others=any(config.mass_to_others for config in configs),
        )
        parts = [
            Part(at, each.alpha, each.margin, each.one_sided, each.value_weight, each.harm_threshold, each.max_excused)
            for at, each in enumerate(configs)
        ]
        combined = cls(CombinedGuide([fusion.guide for fusion in fusions], parts), config, on_step=on_step)
        combined._target_width = next((width for each in fusions if (width := each._target_width) is not None), None)
        return combined

    def __setattr__(self, name: str, value: object) -> None:
        if not (name.startswith("_") or name in ("guide", "config", "on_step") or hasattr(type(self), name)):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} to set; options of the fusion are set by "
                f"fusion.alpha = ..., or fusion.set(margin=..., max_shift=..., ...)."
            )
        super().__setattr__(name, value)

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
        """Change options of the fusion (fields of FusionConfig); what has been followed so far stays of use.

        With another mode, the others are those that the guide recommends for it.

        Raises:
            InputError: an unknown option, or a value out of range.
            MissingHeadError: the mode needs a head or an alignment that is not there.
        """
        keeps_mode = options.get("mode", self.config.mode) == self.config.mode
        config = recommended_config(self.config.to_dict() if keeps_mode else self.guide.recommended, options)
        self._embedding = self._prepare(config)
        self.config = config
        return self

    def __repr__(self) -> str:
        options = "".join(f", {name}={getattr(self.config, name)!r}" for name in MODES[self.config.mode].options)
        return (
            f"{type(self).__name__}(mode={self.config.mode!r}, alpha={self.config.alpha:g}{options}, "
            f"guide={type(self.guide).__name__}, vocabulary={self.guide.vocabulary.name!r})"
        )

    def add_words(self, words: Iterable[str] | Mapping[str, float], bias: float = LOWERED) -> CalibFusion:
        """Lower further words, in whatever pieces the target spells them.

        Args:
            words: of letters a to z; one, several, or with a bias for each (above 0: a protected name).
            bias: of words without one, in nats; before the strength is applied.

        Returns:
            This object.

        Raises:
            InputError: a word of other characters, or a guide that is no universal calibrator.
        """
        return self._with_words(words, -abs(bias))

    def protect_names(self, names: Iterable[str] | Mapping[str, float], bias: float = PROTECTED) -> CalibFusion:
        """Give names of people or groups back what the calibrator may take from them; see `add_words`."""
        return self._with_words(names, abs(bias))

    def _with_words(self, words: Iterable[str] | Mapping[str, float], bias: float) -> CalibFusion:
        given = dict.fromkeys([words] if isinstance(words, str) else words, bias)
        if not all(isinstance(word, str) for word in given):
            raise InputError(f"Expected words as strings, got {list(given)!r}.")
        guide = self.guide
        if not isinstance(guide, BoundCalibrator) or not isinstance(guide.calibrator, Calibrator):
            kind = type(guide.calibrator).__name__
            raise InputError(f"Words are a part of universal calibrators, and this is a {kind}.")
        given |= words if isinstance(words, Mapping) else {}
        with_words = guide.calibrator.with_words({word.lower(): each for word, each in given.items()})
        self.guide = with_words.bind(guide.vocabulary, dtype=guide.vectors.dtype, device=guide.device)
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
        own = ("_of_thread", "_account", "_ledger")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._account, self._ledger = Account(), Ledger()
        self.reset()

    def report(self, *, mask: Callable[[str], str] | None = None) -> Report:
        """What was done in all steps so far (`fuse_logits` takes none).

        `mask`: how the tokens that lost most are written; None: all letters but the first as stars.
        """
        self._ledger.settle()
        return self._account.report(self.guide.vocabulary, mask=mask)

    @contextmanager
    def required(self) -> Iterator[CalibFusion]:
        """Raise a FusionNotAppliedError if the block finishes without one call of this processor.

        Some engines accept `logits_processor` and drop it silently (`generate_batch`, `cache_implementation="paged"`).
        """
        before = self._fused
        yield self
        if self._fused == before:
            raise FusionNotAppliedError(
                "The generation finished without one step of CalibFusion: the engine dropped `logits_processor` or its "
                "error, and the text is the plain model's. Use model.generate() without continuous batching or a paged "
                "cache."
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
        if input_ids.ndim != 2 or scores.ndim != 2 or input_ids.shape[0] != scores.shape[0]:
            raise VocabularyMismatchError(
                "Expected input_ids [rows, length] and scores [rows, vocabulary] with equal rows, got "
                f"{tuple(input_ids.shape)} and {tuple(scores.shape)}."
            )
        self._calls += 1
        if scores.shape[0] == 0 or self._is_foreign(input_ids, scores.shape[-1]):
            return scores.float()
        if input_ids.shape[1] == 0:
            self._warn(
                "The generation begins without token ids (inputs_embeds): the calibrator does not see the prompt, and "
                "judges the continuation alone."
            )
        guide = self._follow(scores.device)
        input_ids = input_ids.to(scores.device)
        said, readings = None, _readings(input_ids, scores)
        if self.config.alpha == 0.0:
            values = readings.tolist()
        else:
            said, values = self._rows(guide).step(input_ids, readings)
        has_dead_rows = self._check(values, scores.shape[-1])
        step = self._account if self.on_step is None else Account()
        fused = self._fuse(scores, said, has_dead_rows, step)
        self._fused += 1  # llama.cpp swallows errors: one that was raised above is none that was applied
        if self.on_step is not None:
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
        batch, length, vocab_size = logits.shape
        has_dead_rows = self._check(_readings(input_ids, logits).tolist(), vocab_size)
        if self.config.alpha == 0.0:
            return self._fuse(logits, None, has_dead_rows)
        said = guide.sequence(input_ids, attention_mask)
        step = max(1, _SEQUENCE_CHUNK // (batch * vocab_size))
        parts = [
            self._fuse(logits[:, start : start + step], said.positions(start, start + step), has_dead_rows)
            for start in range(0, length, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _fuse(
        self, scores: Tensor, said: NextTokenScores | None, has_dead_rows: bool, account: Account | None = None
    ) -> Tensor:
        """Fuse; rows that exclude every token are left as they are (dead beams of a constraint)."""
        alone = unjudgeable(scores) if has_dead_rows else None

        def observe(moved: Moved) -> None:
            if account is not None:
                self._ledger.enter([account] * scores.shape[0], moved, alone)

        if said is not None and self._embedding is None:
            guide = self.guide
            return fuse(
                scores, said.log_scores, guide.covers, self.config, guide.always_candidates(scores.shape[-1]),
                pick=said.log_scores_at, alone=alone, observe=None if account is None else observe,
                protected=guide.protected, parts=guide.parts,
            )  # fmt: skip
        raw = scores if alone is None else scores.masked_fill(alone[..., None], 0.0)
        plain = raw.float().log_softmax(-1)
        fused = plain if said is None or self._embedding is None else self._embedding(raw, last_states(said))
        observe(Moved.of(plain, fused))
        return fused if alone is None else torch.where(alone[..., None], scores.float(), fused)

    def _prepare(self, config: FusionConfig) -> EmbeddingFusion | None:
        """Check that the mode has what it needs; what mode "embedding" has beside the guide."""
        for head in needed_heads(config, self.guide.parts):
            if head not in self.guide.heads:
                raise MissingHeadError(
                    f"Mode {config.mode!r} needs the head {head!r}, but the calibrator has only "
                    f"{', '.join(map(repr, self.guide.heads))}. Choose another mode, or a calibrator with that head."
                )
        if MODES[config.mode].fuse is not None:
            return None
        if self._target is None:
            raise InputError(
                f"Mode {config.mode!r} decodes through the target's own output head: pass target= (the model)."
            )
        if self._alignment is None:
            raise MissingHeadError(
                f"Mode {config.mode!r} needs an alignment of the calibrator with the target: pass alignment=, or use "
                "CalibFusion.from_pretrained, which finds the one that `calibfuse align-embedding` made."
            )
        self._alignment.check(alignable(self.guide))
        output_head = find_output_head(self._target)
        return EmbeddingFusion(self._alignment.matrix, output_head, config.alpha, config.hidden_temperature)

    def _is_foreign(self, input_ids: Tensor, width: int) -> bool:
        """Whether scores are those of another model than the target: an assistant with a tokenizer of its own."""
        if self._embedding is not None:
            return False
        if self._target_width is not None:
            return width != self._target_width
        if not (problem := self.guide.misfit(width)):
            return False
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < width:
            raise VocabularyMismatchError(f"{problem} The ids lie beyond them, too: pass ids and scores of one model.")
        self._warn(
            f"{problem} Such scores are left as they are: pass target= (the model) if they are an assistant's, and "
            "the right tokenizer= if they are the target's."
        )
        return True

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=5)

    def _follow(self, device: torch.device) -> Guide:
        """The guide, moved to the scores' device the first time they differ."""
        if self.guide.device != device:
            self.guide = self.guide.to(device)
        return self.guide

    def _check(self, readings: list[float], width: int) -> bool:
        """Refuse what cannot be fused; whether a row excludes every token."""
        lowest, highest, first_id, last_id = readings
        if not highest < math.inf:
            raise InputError(
                "The target model's scores hold nan or +inf; its forward pass failed (overflow in half precision?)."
            )
        # A prompt may hold ids beyond the head (image marks) as long as the tokenizer has them.
        if first_id < 0 or last_id >= max(width, self.guide.target_vocab_size):
            raise VocabularyMismatchError(
                f"input_ids hold {int(first_id if first_id < 0 else last_id)}, outside the {width} ids of the scores "
                f"and the {self.guide.target_vocab_size} of the tokenizer. Do ids, scores and tokenizer belong to the "
                "same model?"
            )
        return lowest == -math.inf


def _readings(input_ids: Tensor, scores: Tensor) -> Tensor:
    """What `_check` judges, float32 [4] on the device: lowest and highest best score, lowest and highest id."""
    # The maximum of a row is nan where any score is, and -inf where all are: one reduction for both checks.
    best = scores.amax(dim=-1).float()
    ids = input_ids if input_ids.numel() else best.new_zeros(1)
    return torch.stack([best.amin(), best.amax(), ids.amin(), ids.amax()])


def _name_of(thing: object) -> str:
    """Where a tokenizer or a model was loaded from; empty where it does not say."""
    return str(thing if isinstance(thing, str | os.PathLike) else getattr(thing, "name_or_path", None) or "")


def _head_width(target: PreTrainedModel | None) -> int | None:
    head: Any = getattr(target, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _tokenizer_name(target: PreTrainedModel | None) -> str:
    if target is None:
        raise InputError(
            "CalibFusion needs the target's vocabulary: pass tokenizer= (a tokenizer, a name or a path) or target= "
            "(the model)."
        )
    if not (name := _name_of(target)):
        raise InputError(
            f"The target model ({type(target).__name__}) does not know where it was loaded from, so its tokenizer "
            "cannot be found: pass tokenizer= as well."
        )
    return name


def _has_other_tokenizer(guide: Guide, tokenizer: TokenizerLike, target: PreTrainedModel) -> bool:
    """Whether the tokenizer beside the target's weights, where it is at hand, spells the ids differently."""
    if not _name_of(target) or _name_of(target) == _name_of(tokenizer):
        return False
    try:
        own = Vocabulary.from_tokenizer(_name_of(target), local_files_only=True)
    except VocabularyError:
        return False
    count = min(len(own), guide.target_vocab_size)
    different = sum(own.token_bytes(each) != guide.vocabulary.token_bytes(each) for each in range(count))
    return different > _OTHER_VOCABULARY * count
