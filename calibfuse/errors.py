"""The exceptions of calibfuse: one small tree; each also inherits the builtin that fits. Imports nothing."""

# Longer messages of other libraries are advice, not a reason; a sentence is never cut.
_LONG_REASON = 200


class CalibfuseError(Exception):
    """Base class of every error that calibfuse raises on purpose."""


class InputError(CalibfuseError, ValueError):
    """An argument or option is outside what is accepted (unknown mode, alpha out of range, nan in scores)."""


class DataError(CalibfuseError, ValueError):
    """A text file, prompt file or data set cannot be used (missing, empty, binary, no usable line)."""


class VocabularyError(CalibfuseError, ValueError):
    """A tokenizer cannot be turned into a vocabulary of byte strings, or is no tokenizer at all."""


class VocabularyMismatchError(VocabularyError):
    """Ids, scores or alignment belong to another vocabulary than the one that was bound."""


class MissingHeadError(CalibfuseError, ValueError):
    """The chosen mode needs a head (reference, value, alignment) that the calibrator does not have."""


class CheckpointError(CalibfuseError, OSError):
    """A checkpoint is missing, damaged, truncated, or not one of ours; or could not be written."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint was written in a newer format than this version reads."""


class FusionNotAppliedError(CalibfuseError, RuntimeError):
    """A generation inside `fusion.required()` finished without calling the processor."""


class ScorerError(CalibfuseError, RuntimeError):
    """A toxicity scorer failed or returned something that is no score; never replaced by a number."""


class MissingDependencyError(CalibfuseError, ImportError):
    """A feature needs a package of an extra that is not installed."""


def reason_of(error: BaseException) -> str:
    r"""Why, as said by an error of another library: its first whole sentences on one line, without the last full stop.

    Example:
        >>> reason_of(ValueError("It is\n damaged.  Get another."))
        'It is damaged. Get another'
    """
    reason, *others = (" ".join(str(error).split()) or type(error).__name__).split(". ")
    for sentence in others:
        if len(reason) + len(sentence) > _LONG_REASON:
            break
        reason += ". " + sentence
    return reason.rstrip(".:")


def check_ranges(settings: object, **ranges: str | tuple[str, ...]) -> None:
    """Refuse (InputError) a field that is outside its interval, such as "(0, 1]", or none of its choices; None passes.

    Example:
        >>> from types import SimpleNamespace
        >>> check_ranges(SimpleNamespace(steps=0), steps="[1, inf)")
        Traceback (most recent call last):
        calibfuse.errors.InputError: steps must be at least 1, got 0.
    """
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(allowed, tuple):
            holds, told = value in allowed, " or ".join(map(repr, allowed))
        else:
            low, high = (float(end) for end in allowed[1:-1].split(", "))  # nan fails every comparison
            holds = (low < value if allowed[0] == "(" else low <= value) and (
                value < high if allowed[-1] == ")" else value <= high
            )
            told = f"above {low:g}" if allowed[0] == "(" else f"at least {low:g}"
            if high < float("inf"):
                told += f" and {'below' if allowed[-1] == ')' else 'at most'} {high:g}"
        if not holds:
            raise InputError(f"{name} must be {told}, got {value!r}.")
