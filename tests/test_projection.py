"""Projection by bytes against sums over all spellings, which are possible on small vocabularies."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from calibfuse.guide import Request
from calibfuse.guides.kv_cache import RaggedReader
from calibfuse.guides.projected_lm import ProjectedLM
from calibfuse.guides.projection import GOES_ON, Marginals, Projection, SortedStrings
from calibfuse.guides.source_text import MAX_WORD, SourceText
from calibfuse.vocabulary import Vocabulary

CPU = torch.device("cpu")


class LongestMatch:
    """A tokenizer: longest match first, id 0 is the start token."""

    def __init__(self, strings):
        self.strings = strings
        self.ids = {text: at for at, text in reversed(list(enumerate(strings))) if text}

    def encode(self, text, add_special_tokens=False):
        data, ids = text.encode(), []
        while data:
            size = max((size for size in range(1, len(data) + 1) if data[:size] in self.ids), default=0)
            if not size:
                data = data[1:]
                continue
            ids.append(self.ids[data[:size]])
            data = data[size:]
        return ids


OWN = [None, *(bytes([each]) for each in b" abhnt"), b" t", b" th", b"an", b"at", b" tha", b"ta", b"nt"]
TARGET = [
    None,
    None,
    *(bytes([each]) for each in b" abhnt"),
    b" t",
    b"th",
    b" that",
    b"hat",
    b"ant",
    b"at",
    b"than",
    b"n ",
]


def model_of(size, seed=0, spread=6.0, layers=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_layer=layers, n_embd=32, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
            )
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(spread)
    return model


def trained_model(texts, tokenizer, steps=120):
    """A model that knows its tokenizer's way of spelling."""
    model = model_of(len(tokenizer.strings), spread=1.0).train()
    rows = [torch.tensor([0, *tokenizer.encode(text)]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(steps):
            picked = ids[torch.randint(len(ids), (16,))]
            loss = model(picked.clamp(min=0), labels=picked.masked_fill(picked < 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def sentences(count=200):
    """Words of the six letters, some often, some rarely; a text begins with a space."""
    words = [" that", " than", " at", " a", " an", " ant", " bath", " that", " than", " hat", " tan", " bat", " naan"]
    choose = torch.Generator().manual_seed(1)
    picks = (torch.rand(count, 9, generator=choose) ** 2 * len(words)).long()
    return ["".join(words[each] for each in row) for row in picks.tolist()]


@functools.cache
def probs_after(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def exact_marginal(model, strings, text, ids=(0,), done=b""):
    """Probability that the model's text begins with `text`: over all spellings, the last token may run past its end."""
    left, total = text[len(done) :], 0.0
    if not left:
        return 1.0
    probs = probs_after(model, ids)
    for token_id, token in enumerate(strings):
        if token and token.startswith(left):
            total += float(probs[token_id])
        elif token and left.startswith(token):
            total += float(probs[token_id]) * exact_marginal(model, strings, text, (*ids, token_id), done + token)
    return total


def guide_of(model, own=None, target=None, tokenizer=None):
    own, target = own or OWN, target or TARGET
    text = SourceText(tokenizer or LongestMatch(own), Vocabulary.from_byte_strings(own), 0)
    return ProjectedLM(None, {"calibrator": model}, text, Vocabulary.from_byte_strings(target))


def say(guide, ids):
    return guide.session().step([Request(0, ids)])


def log_marginals(guide, ids):
    """Of each token, up to a constant; here " th" holds all of " the"."""
    marginals = guide.marginals(RaggedReader(guide.models), [0], [guide.prefix(None, list(ids))])["calibrator"]
    masses = torch.nn.functional.pad(marginals, (0, 1))
    return masses.clamp(min=1e-300).log()[..., guide.projection.target_place]


def covered(logs, target):
    keep = [at for at, text in enumerate(target) if text]
    return logs[0, keep].double().softmax(-1)


def distances(model, ids, tokenizer=None):
    """Total variation of marginals and of token masses from the exact ones, over all target tokens."""
    guide = guide_of(model, tokenizer=tokenizer)
    said = say(guide, ids)
    text = b"".join(TARGET[each] for each in ids)
    exact = torch.tensor([exact_marginal(model, OWN, text + each) for each in TARGET if each], dtype=torch.float64)
    places = guide.projection.target_place[[at for at, each in enumerate(TARGET) if each]]
    in_order = torch.zeros(len(guide.projection.target), dtype=torch.float64)
    in_order[places] = exact
    masses = guide.projection.token_masses(in_order)[places]
    found = covered(log_marginals(guide, ids), TARGET), covered(said.log_scores("calibrator"), TARGET)
    return [float((got - want / want.sum()).abs().sum() / 2) for got, want in zip(found, (exact, masses), strict=True)]


def ids_of(text):
    return LongestMatch(TARGET).encode(text)


def test_byte_tokens_are_exact():
    """Where each token of both is one byte there is one spelling."""
    own = [None, *(bytes([each]) for each in b" abhnt")]
    target = [None, *(bytes([each]) for each in b" abhnt")]
    model = model_of(len(own), spread=12.0)
    for text in (b"", b" tha", b"a"):
        ids = [target.index(bytes([each])) for each in text]
        got = covered(log_marginals(guide_of(model, own, target), ids), target)
        exact = torch.tensor([exact_marginal(model, own, text + each) for each in target if each]).double()
        assert torch.allclose(got, exact / exact.sum(), atol=1e-6)


def test_improbable_words_without_spaces_are_exact_too():
    """Sixty tokens of probability 1e-7 each must not drown what comes after them."""
    own = [None, *(bytes([each]) for each in b"abhnt")]
    target = [None, *(bytes([each]) for each in b"abhnt")]
    model = model_of(len(own), spread=30.0)
    ids, text = [], b""
    while len(ids) < 40:
        ids.append(1 + int(probs_after(model, (0, *ids))[1:].argmin()))
        text += target[ids[-1]]
    after = [float(probs_after(model, (0, *ids[:at]))[ids[at]]) for at in range(40)]
    assert math.prod(after) < 1e-60
    got = covered(log_marginals(guide_of(model, own, target), ids), target)
    exact = torch.tensor(
        [exact_marginal(model, own, text + each, (0, *ids), text) for each in target if each], dtype=torch.float64
    )
    assert torch.allclose(got, exact / exact.sum(), atol=1e-6)


@pytest.fixture(scope="module")
def trained():
    return trained_model(sentences(), LongestMatch(OWN))


def test_a_trained_model_is_projected_near_the_sum_over_all_spellings(trained):
    """As near as a share for longer tokens comes, where most of them are longer than the own ones."""
    texts = [text[:at] for text in sentences(4) for at in (3, 5, 8)]
    marginals, shares = torch.tensor([distances(trained, ids_of(text)) for text in texts]).T
    assert marginals.mean() < 0.3
    assert marginals.max() < 0.5
    assert shares.mean() < 0.5


def test_the_same_vocabulary_projects_to_itself(trained):
    """With a space before it every word is finished, and own tokens are their own longest match."""
    tokenizer, text = LongestMatch(OWN), " that ant bath"
    guide = guide_of(trained, target=OWN)
    ids = tokenizer.encode(text)
    own = probs_after(trained, (0, *ids))[1:]
    got = say(guide, ids).log_scores("calibrator")[0, 1:].double().softmax(-1)
    assert float((got - own / own.sum()).abs().sum() / 2) < 0.15


def test_masses_add_up_and_copies_share():
    target = [None, *(bytes([each]) for each in b" abhnt"), b"th", b"th", b"tha"]
    guide = guide_of(model_of(len(OWN)), target=target)
    said = say(guide, [6, 1])
    marginals = log_marginals(guide, [6, 1])[0].exp()
    scores = said.log_scores("calibrator")[0].exp()
    assert torch.isclose(marginals[7], marginals[8])
    assert torch.isclose(scores[7], scores[8])
    single = guide_of(model_of(len(OWN)), target=[*target[:8], target[9]])
    alone = covered(say(single, [6, 1]).log_scores("calibrator"), [*target[:8], target[9]])
    shared = covered(said.log_scores("calibrator"), target)
    assert torch.allclose(alone[6], shared[6] + shared[7], atol=1e-6)


def test_permuted_ids_permute_the_distribution():
    order = [0, 1, *reversed(range(2, len(TARGET)))]
    model, ids = model_of(len(OWN)), ids_of(" that an")
    plain = say(guide_of(model), ids).log_scores("calibrator")[0]
    moved = say(guide_of(model, target=[TARGET[each] for each in order]), [order.index(each) for each in ids])
    assert torch.allclose(moved.log_scores("calibrator")[0][2:], plain[order][2:], atol=1e-4)


def test_what_the_source_vocabulary_cannot_spell_is_not_covered():
    guide = guide_of(model_of(len(OWN)), target=[None, b"a", b"that", b"axe", b"x", b"nt t"])
    assert guide.covers(torch.arange(6)).tolist() == [False, True, True, False, False, True]
    assert guide.covers(torch.tensor([-1, 6, 999])).tolist() == [False] * 3
    assert torch.isfinite(say(guide, [2, 4, 1]).log_scores("calibrator")).all()


def slow_marginals(own, probs, targets):
    masses = []
    for text in targets:
        total = 0.0
        for begun, prob in zip(own, probs, strict=True):
            if begun.startswith(text):
                total += prob
            elif text.startswith(begun):
                going_on = [each for each in targets if each.startswith(begun)]
                total += prob * GOES_ON * sum(each.startswith(text) for each in going_on) / (len(going_on) + 1)
        masses.append(total)
    return masses


strings = st.sets(
    st.text("ab\u00ff", min_size=1, max_size=4).map(lambda text: text.encode("latin-1")), min_size=2, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(strings, strings)
def test_tables_say_what_a_slow_loop_says(own, targets):
    own, targets = sorted(own), sorted(targets)
    probs = torch.arange(1.0, len(own) + 1, dtype=torch.float64) / sum(range(1, len(own) + 1))
    got = Marginals(SortedStrings(own), targets, CPU)(probs[None])[0]
    assert torch.allclose(got, torch.tensor(slow_marginals(own, probs.tolist(), targets), dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(strings, strings, st.sampled_from([b"a", b"b", b"ab", b"\xff", b"ba\xff"]))
def test_crossing_says_what_a_slow_loop_says(own, targets, word):
    own, targets = sorted(own), sorted(targets)
    projection = Projection(Vocabulary.from_byte_strings(own), Vocabulary.from_byte_strings(targets), CPU)
    probs = torch.rand(1, len(own), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masses = torch.zeros(1, len(targets), dtype=torch.float64)
    projection.crossing(word).add(masses, probs)
    beyond = [
        (each[len(word) :], prob) for each, prob in zip(own, probs[0].tolist(), strict=True) if each.startswith(word)
    ]
    beyond = [(rest, prob) for rest, prob in beyond if rest]
    slow = slow_marginals([rest for rest, _ in beyond], [prob for _, prob in beyond], targets)
    assert torch.allclose(masses[0], torch.tensor(slow, dtype=torch.float64))


# ---- the text in own tokens


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([each or b"" for each in TARGET]), max_size=25), st.integers(0, 25))
def test_text_extends_as_it_starts_anew(pieces, cut):
    text = SourceText(LongestMatch(OWN), Vocabulary.from_byte_strings(OWN), 0)
    whole = text.extend(text.empty(), pieces)
    assert whole == text.extend(text.extend(text.empty(), pieces[:cut]), pieces[cut:])
    if b"" not in pieces:
        spelled = b"".join(OWN[each] for each in whole.closed[1:])
        assert spelled + whole.word == b"".join(pieces)


def test_words_that_never_end_are_cut_at_a_character(any_tokenizer):
    text = SourceText(any_tokenizer, Vocabulary.from_tokenizer(any_tokenizer), 0)
    prefix = text.extend(text.empty(), ["é".encode()] * 200)
    assert len(prefix.word) <= MAX_WORD + 1
    prefix.word.decode()


def test_own_spelling_is_the_tokenizers_own(any_tokenizer, sample_lines):
    """Finished words are spelled as in the whole text, but for tokenizers whose tokens run across spaces."""
    text = SourceText(any_tokenizer, Vocabulary.from_tokenizer(any_tokenizer), 0)
    vocabulary, same, total = text.vocabulary, 0, 0
    for line in sample_lines[:30]:
        whole = any_tokenizer.encode(line, add_special_tokens=False).ids
        spelled = b"".join(map(vocabulary.token_bytes, whole))
        prefix = text.extend(text.empty(), [bytes([each]) for each in spelled])
        got = [*prefix.closed[1:], *text.spell(prefix.word).ids]
        same, total = same + (got == whole), total + 1
    assert same >= 0.9 * total


def test_broken_characters_are_spelled_or_kept(byte_level_tokenizer):
    text = SourceText(byte_level_tokenizer, Vocabulary.from_tokenizer(byte_level_tokenizer), 0)
    for word in (b" caf\xc3", b" \xff\xfe x", b"\x80", "né".encode()):
        spelling = text.spell(word)
        assert b"".join(map(text.vocabulary.token_bytes, spelling.ids)) + spelling.rest == word
        assert not spelling.rest
    letters = SourceText(LongestMatch(OWN), Vocabulary.from_byte_strings(OWN), 0)
    assert letters.spell(b" that\xc3").rest == b"\xc3"
