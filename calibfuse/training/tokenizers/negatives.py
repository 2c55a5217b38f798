"""Byte strings that large vocabularies hold and English text never produces, as negatives for training."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from itertools import accumulate
from pathlib import Path

import numpy as np

from calibfuse.errors import InputError

MAX_COUNT = 500_000

# Everyday words of other languages, by language and by script, names common in program text (what is made of them only
# has to look like the language, letter by letter), ranges of code points, punctuation, and the share of each kind.
_DATA = json.loads(Path(__file__).with_name("negatives.json").read_text(encoding="utf-8"))
LATIN_WORDS: dict[str, str] = _DATA["latin"]
SCRIPT_WORDS: dict[str, str] = _DATA["scripts"]
KIND_WEIGHTS: dict[str, float] = _DATA["shares of the kinds"]
_MARKS: str = _DATA["marks"]
_RUNS: list[str] = _DATA["runs"]

Maker = Callable[[random.Random], str | bytes]


def frequent_words(texts: Iterable[str], limit: int = 20_000) -> list[str]:
    """The most frequent words of some texts, lower-cased, most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[a-z]{2,}", text.lower()))
    return [word for word, _ in counts.most_common(limit)]


def text_pieces(texts: Iterable[str]) -> set[bytes]:
    """What tokens of these texts may look like: words, words behind one mark, and runs of marks; lower-cased."""
    pieces: set[str] = set()
    for text in texts:
        lower = text.lower()
        marked = re.findall(r"[^\s\w]?[^\W\d]+", lower)
        pieces.update(marked)
        pieces.update(piece[1:] for piece in marked if not piece[0].isalpha() and len(piece) > 1)
        pieces.update(re.findall(r"[^\s\w]+", lower))
    return {piece.encode() for piece in pieces}


def negative_byte_strings(
    count: int, rng: np.random.Generator, words: Sequence[str], *, exclude: Set[bytes] = frozenset()
) -> list[bytes]:
    """Make strings of the kinds in `KIND_WEIGHTS`."""
    if not 0 <= count <= MAX_COUNT:
        raise InputError(f"The number of negative byte strings must be in [0, {MAX_COUNT}], got {count}.")
    source = random.Random(int(rng.integers(2**63)))
    starts, pieces = _word_pieces(words)
    makers = _makers(source, list(words[:8_000]))
    names = list(KIND_WEIGHTS)
    cumulative = list(accumulate(KIND_WEIGHTS.values()))
    found: dict[bytes, None] = {}
    while len(found) < count:
        made = makers[source.choices(names, cum_weights=cumulative)[0]](source)
        data = made if isinstance(made, bytes) else made.encode()
        bare = _bare(data)
        english = starts if data.startswith(b" ") else pieces
        if data and data not in exclude and bare not in english and bare not in exclude:
            found[data] = None
    return list(found)


def _word_pieces(words: Sequence[str]) -> tuple[set[bytes], set[bytes]]:
    starts = {word[:end].encode() for word in words for end in range(1, len(word) + 1)}
    pieces = {
        word[start:end].encode()
        for word in words
        for start in range(len(word))
        for end in range(start + 1, min(start + 6, len(word)) + 1)
    }
    return starts, pieces | starts


def _bare(data: bytes) -> bytes:
    """Lower case without surrounding white space, where the bytes are text."""
    try:
        return data.decode().strip().lower().encode()
    except UnicodeDecodeError:
        return data


def _makers(source: random.Random, words: list[str]) -> dict[str, Maker]:
    chains = {script: _LetterChain(text.split()) for script, text in SCRIPT_WORDS.items()}
    latin = [_LetterChain(text.split()) for text in LATIN_WORDS.values()]
    code: list[str] = sorted(set(_DATA["code"].split()))
    makers: dict[str, Maker] = {name: _script_maker(source, name, chain) for name, chain in chains.items()}
    alphabets = [_shuffled(source, letters) for letters in _DATA["other scripts"].values()]

    def part(draw: random.Random) -> str:
        return draw.choice(code) if draw.random() < 0.6 or not words else _zipf(draw, words)

    def other_script(draw: random.Random) -> str:
        letters = draw.choice(alphabets)
        return _spaced(draw, "".join(_zipf(draw, letters) for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4, 6)))), 0.3)

    def latin_word(draw: random.Random) -> str:
        word = draw.choice(latin).make(draw, longest=14)
        if draw.random() < 0.4:  # vocabularies hold more pieces of words than words
            start = draw.randrange(len(word))
            word = word[start : start + draw.randint(2, 8)]
            return word if draw.random() < 0.7 else " " + word
        word = word.capitalize() if draw.random() < 0.2 else word
        return _spaced(draw, word, 0.7)

    def mark_and_word(draw: random.Random) -> str:
        mark, word = draw.choice(_MARKS), part(draw)
        return (
            mark + (word.capitalize() if draw.random() < 0.3 else word) + draw.choice(("", "", "", "(", "=", "_", "["))
        )

    def camel_case(draw: random.Random) -> str:
        parts = [part(draw) for _ in range(draw.choice((2, 2, 2, 3, 3, 4)))]
        first = parts[0] if draw.random() < 0.5 else parts[0].capitalize()
        return _spaced(draw, first + "".join(word[:1].upper() + word[1:] for word in parts[1:]), 0.4)

    def snake_case(draw: random.Random) -> str:
        text = "_".join(part(draw) for _ in range(draw.choice((1, 2, 2, 3))))
        text = text.upper() if draw.random() < 0.4 else text
        return _spaced(draw, draw.choice(("", "_", "__")) + text + draw.choice(("", "", "_")), 0.4)

    def upper_case(draw: random.Random) -> str:
        word = part(draw).upper()
        start = draw.randrange(max(1, len(word) - 2))
        return _spaced(draw, word[start : start + draw.randint(2, 9)], 0.4)

    makers.update(
        {
            "other scripts": other_script,
            "latin": latin_word,
            "mark and word": mark_and_word,
            "camel case": camel_case,
            "snake case": snake_case,
            "upper case": upper_case,
            "punctuation": _punctuation,
            "white space": _white_space,
            "digits": _digits,
            "partial utf-8": _partial_maker(source, makers),
            "symbols": _symbols,
            "entities": lambda draw: (
                draw.choice(("&", "&", "&amp;", "<", "</", "#"))
                + draw.choice((*_DATA["entities"], *code))
                + draw.choice((";", ";", ">"))
            ),
        }
    )
    return makers


class _LetterChain:
    """Makes words letter by letter, each drawn after the two before it; trained on a list of words."""

    def __init__(self, words: Sequence[str]) -> None:
        self._next: dict[str, list[str]] = defaultdict(list)
        for word in words:
            padded = "\n\n" + word + "\n"
            for index in range(2, len(padded)):
                self._next[padded[index - 2 : index]].append(padded[index])
                self._next[padded[index - 1]].append(padded[index])

    def make(self, draw: random.Random, longest: int) -> str:
        word = ""
        while len(word) < longest:
            context = ("\n\n" + word)[-2:]
            # Sometimes only the last letter counts, so that more than the words of the list come out.
            choices = self._next[context if draw.random() < 0.6 and context in self._next else context[-1]]
            letter = choices[int(draw.random() * len(choices))]
            if letter == "\n":
                if word:
                    break
                continue
            word += letter
        return word


def _script_maker(source: random.Random, name: str, chain: _LetterChain) -> Maker:
    letters = _shuffled(source, _DATA["letters of the scripts"][name])
    is_syllabic = name in ("Han", "Hangul", "Kana")
    lengths = (1, 1, 1, 2, 2, 3) if is_syllabic else (1, 1, 2, 2, 3, 3, 4, 5, 7)
    space_share = 0.15 if name in ("Han", "Kana", "Thai") else 0.5

    def make(draw: random.Random) -> str:
        if draw.random() < (0.35 if is_syllabic else 0.75):
            word = chain.make(draw, longest=5 if is_syllabic else 12)
            if draw.random() < 0.4 and len(word) > 2:
                word = word[draw.randrange(len(word) - 1) :]
            return _spaced(draw, word.capitalize() if draw.random() < 0.1 else word, space_share)
        # Each character of the large scripts is a feature of its own: draw them evenly, to have seen most of them.
        pick = random.Random.choice if len(letters) > 1000 else _zipf
        return _spaced(draw, "".join(pick(draw, letters) for _ in range(draw.choice(lengths))), space_share)

    return make


def _partial_maker(source: random.Random, makers: dict[str, Maker]) -> Maker:
    """Pieces of characters: what byte-level BPE learns between the bytes of a script."""
    kinds = [name for name in makers if name in SCRIPT_WORDS]

    def make(draw: random.Random) -> bytes:
        whole = makers[draw.choice(kinds)](draw) if draw.random() < 0.8 else _symbols(draw)
        data = whole.encode() if isinstance(whole, str) else whole
        start = draw.randrange(len(data))
        piece = data[start : start + draw.choice((1, 2, 2, 2, 3, 4, 5))]
        return b" " + piece if draw.random() < 0.15 else piece

    return make


def _punctuation(draw: random.Random) -> str:
    roll = draw.random()
    if roll < 0.2:
        return draw.choice("-=*#_/.~+<>|^%!?") * int(2 ** (1 + 6 * draw.random())) + draw.choice(("", "", "\n"))
    if roll < 0.6:
        text = draw.choice(_RUNS) + draw.choice(("", *_RUNS))
    else:
        text = "".join(draw.choice(_MARKS.replace("\t", "") + ")]}") for _ in range(draw.choice((2, 2, 3, 3, 4, 5))))
    return _spaced(draw, text, 0.3)


def _white_space(draw: random.Random) -> str:
    kind = draw.choice((" ", " ", "\t", "\n", "\r\n", "\u00a0", "\n\t", " \n"))
    return draw.choice(("", "\n", "\t")) + kind * draw.randint(2, 40 // len(kind)) + draw.choice(("", "", "\n", " "))


def _digits(draw: random.Random) -> str:
    # Plain short numbers are left to the tokenizers of the pool: English text holds them all.
    number = draw.randrange(10 ** draw.choice((2, 3, 4, 5, 6, 8)))
    roll = draw.random()
    if roll < 0.3:
        return _spaced(draw, str(number + 10**5), 0.4)
    if roll < 0.6:
        return f"0x{number:04X}" if roll < 0.4 else f"{number + 2**12:x}"
    return draw.choice("_=[+{|") + str(number)


def _symbols(draw: random.Random) -> str:
    first, last = draw.choice(_DATA["symbols"])
    text = chr(draw.randint(int(first, 16), int(last, 16)))
    if draw.random() < 0.25:
        text = text * draw.randint(2, 8)
    elif draw.random() < 0.2:
        text += draw.choice(',.;:!)\n"') + draw.choice(("", "\n"))
    return _spaced(draw, text, 0.3)


def _spaced(draw: random.Random, text: str, share: float) -> str:
    return " " + text if draw.random() < share else text


def _shuffled(source: random.Random, ends: Sequence[str]) -> str:
    """The characters from one code point to another, both in hexadecimal."""
    letters = [chr(value) for value in range(int(ends[0], 16), int(ends[1], 16) + 1)]
    source.shuffle(letters)
    return "".join(letters)


def _zipf(draw: random.Random, items: Sequence[str]) -> str:
    """One item; the k-th of n comes with a probability near 1/k (log-uniform rank)."""
    return items[min(len(items) - 1, int((len(items) + 1) ** draw.random()) - 1)]
