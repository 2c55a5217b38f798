"""The styles of tokenizer that occur in practice, and how to train one of each on given text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from calibfuse.errors import InputError

SPACE_MARK = "\u2581"
BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))

# Alternatives shared by the newer byte-level families: a letter run takes one leading character that is no letter,
# digit or newline; punctuation runs take the newlines after them; the last space of a run goes to the next word.
_CONTRACTION = "(?i:'(?:s|t|re|ve|m|ll|d))"
_AFTER_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TRIPLE_DIGITS_SPLIT = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER_WORDS}"
_SINGLE_DIGIT_SPLIT = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_AFTER_WORDS}"
# Words end where the case changes from lower to upper, and keep their contraction.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASE_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# After spaces became U+2581: words and punctuation take one mark in front of them, digits stand alone.
_MARKED_SPLIT = (
    rf"{SPACE_MARK}?[\p{{L}}\p{{M}}]+|\p{{N}}|{SPACE_MARK}?[^\s{SPACE_MARK}\p{{L}}\p{{M}}\p{{N}}]+|"
    rf"{SPACE_MARK}+(?={SPACE_MARK}[^\s{SPACE_MARK}\p{{N}}])|{SPACE_MARK}+|\s+"
)
_MARKED_NUMBERS_SPLIT = (
    rf"{SPACE_MARK}?[\p{{L}}\p{{M}}]+|{SPACE_MARK}?\p{{N}}+|{SPACE_MARK}?[^{SPACE_MARK}\p{{L}}\p{{M}}\p{{N}}]+|"
    rf"{SPACE_MARK}"
)

_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Texts = Sequence[str]


@dataclass(frozen=True)
class TokenizerStyle:
    """One way of making a tokenizer."""

    train: Callable[[Texts, int], tokenizers.Tokenizer]  # with at most the given number of tokens
    smallest_size: int = 257  # the smallest vocabulary that makes sense (alphabet and special tokens)
    bytes_per_token: int = 300  # how much text the trainer should see for each token of the vocabulary


def train_tokenizer(style: str, texts: Texts, vocab_size: int) -> tokenizers.Tokenizer:
    """Train one tokenizer."""
    check_style(style, vocab_size)
    return STYLES[style].train(texts, vocab_size)


def check_style(style: str, vocab_size: int) -> None:
    """Raise InputError where there is no such style, or it needs a larger vocabulary."""
    if style not in STYLES:
        raise InputError(f"Unknown tokenizer style {style!r}; expected one of {', '.join(STYLES)}.")
    if vocab_size < STYLES[style].smallest_size:
        raise InputError(f"Style {style!r} needs at least {STYLES[style].smallest_size} tokens, got {vocab_size}.")


def _byte_level(
    before: list[pre_tokenizers.PreTokenizer] | None = None,
    after: list[pre_tokenizers.PreTokenizer] | None = None,
    *,
    use_regex: bool = True,
    normalizer: normalizers.Normalizer | None = None,
) -> Callable[[Texts, int], tokenizers.Tokenizer]:
    """A trainer of byte-level BPE; `before` and `after` stand around the mapping of bytes to visible characters."""

    def train(texts: Texts, vocab_size: int) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        bytes_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*(before or []), bytes_step, *(after or [])])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return train


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _frequent_characters(texts: Texts, normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The characters of the normalised text, most frequent first; trainers choose at random among equal ones."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for result in normalizer.normalize_str(character):
            counts[result] += count
    return sorted(counts, key=lambda character: (-counts[character], character))[:limit]


def _removal_of_others(characters: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """A step that drops every character but these and white space."""
    kept = "".join(re.escape(character) for character in characters)
    return pre_tokenizers.Split(Regex(rf"[^\s{kept}]"), behavior="removed")


def _train_marked_bpe(texts: Texts, vocab_size: int, *, keep_newlines: bool) -> tokenizers.Tokenizer:
    """BPE on characters with U+2581 for spaces and bytes as the last resort.

    With `keep_newlines` runs of newlines become tokens and no mark is put in front of the text; without it newlines
    are bytes and the text starts with a mark.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.normalizer = spaces if keep_newlines else normalizers.Sequence([normalizers.Prepend(SPACE_MARK), spaces])
    cut = _split(_MARKED_SPLIT)
    # Newlines are kept from the trainer so that none enters the alphabet: they must come out as bytes.
    drop_newlines = pre_tokenizers.Split(Regex(r"[\r\n\t]"), behavior="removed")
    characters = _frequent_characters(texts, tokenizer.normalizer, min(1000, vocab_size // 8))
    steps = [_removal_of_others(characters), *([] if keep_newlines else [drop_newlines]), cut]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - len(BYTE_TOKENS), 64),
        min_frequency=2,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([] if keep_newlines else [decoders.Strip(" ", 1, 0)])
    )
    state = json.loads(tokenizer.to_str())
    # The usual order: special tokens, bytes, then everything learned.
    special_count = len(state["added_tokens"])
    vocabulary = {
        token: index if index < special_count else index + len(BYTE_TOKENS)
        for token, index in state["model"]["vocab"].items()
    }
    vocabulary.update({token: special_count + value for value, token in enumerate(BYTE_TOKENS)})
    state["model"]["vocab"] = vocabulary
    state["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _train_unigram(texts: Texts, vocab_size: int) -> tokenizers.Tokenizer:
    """Unigram over white-space-separated words with U+2581 in front; white space itself is normalised away."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme="always"),
            _split(_MARKED_NUMBERS_SPLIT),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE_MARK)])
    trainer = trainers.UnigramTrainer(
        vocab_size=max(vocab_size - len(BYTE_TOKENS), 64),
        show_progress=False,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        max_piece_length=16,
        n_sub_iterations=2,
        shrinking_factor=0.75,
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    lowest = min(score for _, score in state["model"]["vocab"])
    # Bytes stand in for characters outside the alphabet; with the lowest score, no other text is cut into them.
    state["model"]["vocab"] += [[token, lowest - 10.0] for token in BYTE_TOKENS]
    state["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _train_word_piece(texts: Texts, vocab_size: int, *, lowercase: bool) -> tokenizers.Tokenizer:
    """WordPiece: words and punctuation marks apart, continuation pieces marked with ##."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.decoder = decoders.WordPiece()
    characters = _frequent_characters(texts, tokenizer.normalizer, min(500, vocab_size // 8))
    cut = pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_removal_of_others(characters), cut])
    # Continuations of one character get their ids first, in a fixed order; the trainer would number them as they come.
    continuations = [f"##{character}" for character in characters if not character.isspace()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*_BERT_SPECIALS, *continuations],
        continuing_subword_prefix="##",
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = cut
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in _BERT_SPECIALS]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


_DIGITS_ALONE = pre_tokenizers.Digits(individual_digits=True)
_GROUPS_OF_THREE = [pre_tokenizers.Digits(individual_digits=False), _split(r"\p{N}{3}")]

STYLES: dict[str, TokenizerStyle] = {
    # GPT-2, Pythia, OPT, Whisper
    "byte-level": TokenizerStyle(_byte_level()),
    # Llama 3, GPT-4: digits in threes, one mark before a word, newlines behind punctuation
    "byte-level-triple-digits": TokenizerStyle(_byte_level([_split(_TRIPLE_DIGITS_SPLIT)], use_regex=False)),
    # Qwen: as Llama 3, but single digits, NFC
    "byte-level-single-digits": TokenizerStyle(
        _byte_level([_split(_SINGLE_DIGIT_SPLIT)], use_regex=False, normalizer=normalizers.NFC())
    ),
    # GPT-4o, Llama 4: words end at a change of case and keep their contraction
    "byte-level-case-split": TokenizerStyle(_byte_level([_split(_CASE_SPLIT)], use_regex=False)),
    # StarCoder, Cohere, SmolLM: single digits cut off before GPT-2's split
    "byte-level-digits-first": TokenizerStyle(_byte_level([_DIGITS_ALONE])),
    # Falcon: punctuation runs apart, without their space; digits in threes
    "byte-level-punctuation": TokenizerStyle(_byte_level([pre_tokenizers.Punctuation("contiguous")], _GROUPS_OF_THREE)),
    # Llama 2, Mistral: U+2581 for spaces, single digits, newlines and rare characters as bytes
    "metaspace-bytes": TokenizerStyle(partial(_train_marked_bpe, keep_newlines=False), smallest_size=400),
    # Gemma: U+2581 for spaces, none in front of the text, newline runs as tokens
    "metaspace-newlines": TokenizerStyle(partial(_train_marked_bpe, keep_newlines=True), smallest_size=400),
    # T5, XLM-R, DeBERTa: words with U+2581, white space normalised
    "unigram": TokenizerStyle(_train_unigram, smallest_size=500, bytes_per_token=200),
    # BERT uncased: lower case, words and single punctuation marks, ## for continuations
    "word-piece-lower": TokenizerStyle(partial(_train_word_piece, lowercase=True), 200, 250),
    # BERT cased: as uncased, case kept
    "word-piece-cased": TokenizerStyle(partial(_train_word_piece, lowercase=False), 200, 250),
}
