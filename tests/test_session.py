"""Texts known by keys, as a serving engine has them: whatever comes and goes, each row is that of its text alone."""

import time

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_calibrators import BOS, PAD, make_bound

from calibfuse.calibrator.body import Block, KeyValueRing
from calibfuse.fusion import FusionConfig, fuse
from calibfuse.guide import Request

SIZE = 96
KEYS = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def bound():
    """With a head that has a block of its own, whose state is the second half of what is compared."""
    heads = ("calibrator", "reference", "value")
    return make_bound(words={"aa": -2.0, "ab": -1.0, "k": 0.5}, heads=heads, value_layer_count=1)


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    monkeypatch.setattr(KeyValueRing, "slack", 5)


def ids_of(length, seed=0, special=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0 if special else 3, 6 if special else SIZE, (length,), generator=generator).tolist()


def step(bound, session, texts, only_tails=False):
    """One step over all texts: each of them, and what the session said of it."""
    reach = bound.reach
    requests = [
        Request(key, ids[-reach:], len(ids)) if only_tails and ids and ids[0] > 2 else (key, ids)
        for key, ids in texts.items()
    ]
    said = session.step(requests)
    return zip(map(tuple, texts.values()), said.hidden, bound.normalise(said.log_scores("calibrator")), strict=True)


def check(bound, said):
    """What a session said of texts is what the guide says of each that it reads as a whole."""
    texts = [ids for ids, _, _ in said]
    whole = list(filter(None, dict.fromkeys(texts)))
    alone = {}
    if () in texts:
        alone[()] = bound.states(torch.zeros(1, 0, dtype=torch.int64))[0, -1], bound.first_log_probs()
    # a causal guide never looks right, so that texts may be filled up there and read in one forward pass
    longest = max(map(len, texts))
    if whole:
        read = bound.sequence(torch.tensor([[*ids, *[3] * (longest - len(ids))] for ids in whole]))
        last = torch.arange(len(whole)), torch.tensor([len(ids) - 1 for ids in whole])
        scores, hidden = bound.normalise(read.log_scores("calibrator"))[last], read.hidden[last]
        alone |= {ids: (hidden[row], scores[row]) for row, ids in enumerate(whole)}
    for number, tolerance in ((0, 2e-4), (1, 1e-3)):
        wanted = torch.stack([alone[ids][number] for ids in texts])
        torch.testing.assert_close(torch.stack([each[1 + number] for each in said]), wanted, atol=tolerance, rtol=1e-3)


action = st.one_of(
    st.tuples(st.just("grow"), st.just(1), st.booleans()),
    st.tuples(st.just("grow"), st.just(1), st.booleans()),
    st.tuples(st.just("grow"), st.integers(2, 6), st.booleans()),
    st.tuples(st.just("back"), st.integers(1, 8), st.booleans()),
    st.tuples(st.just("join"), st.integers(0, 45), st.booleans()),
    st.tuples(st.just("leave"), st.just(0), st.booleans()),
    st.tuples(st.just("pause"), st.just(0), st.booleans()),
    st.tuples(st.just("change"), st.integers(0, 20), st.booleans()),
    st.tuples(st.just("copy"), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("step"), st.integers(0, 10**6), st.booleans()),
)
scripts = st.lists(st.tuples(st.sampled_from(KEYS), action), max_size=40)


def run(bound, script, seed):
    """Follow a script; every entry is one step over the texts that are not paused, in some order."""
    session, texts, paused, said = bound.session(), {}, set(), []
    for number, (key, (what, count, flag)) in enumerate(script):
        ids = texts.get(key)
        if what == "join" or ids is None:
            texts[key] = ids_of(count % 46, seed + number, flag) + ids_of(3, number)
        elif what == "grow":
            texts[key] = ids + ids_of(count, seed + number, flag)
        elif what == "back":
            texts[key] = ids[: max(0, len(ids) - count)]
        elif what == "leave":
            del texts[key]
            session.drop([key, "unknown"])
        elif what == "pause":
            paused ^= {key}
        elif what == "change":
            texts[key] = [*ids[:count], ids_of(1, number)[0], *ids[count + 1 :]]
        elif what == "copy" and KEYS[count] in texts:
            session.copy({key: KEYS[count]})
            texts[key] = texts[KEYS[count]] + (ids_of(1, number) if flag else [])
        order = sorted(texts, key=lambda name: hash((name, number, seed)))
        asked = {name: texts[name] for name in order if name not in paused}
        if asked:
            said += step(bound, session, asked, only_tails=flag)
        assert set(session.keys) <= set(texts)
    session.drop(texts)
    assert session.memory_bytes == 0
    if said:
        check(bound, said)
    return len(script)


@settings(max_examples=40, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(script=scripts, seed=st.integers(0, 10**6))
def test_any_history(bound, script, seed):
    run(bound, script, seed)


@pytest.mark.slow
def test_ten_thousand_random_steps(bound):
    done = 0

    @settings(max_examples=560, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(
        script=st.lists(st.tuples(st.sampled_from(KEYS), action), min_size=10, max_size=40), seed=st.integers(0, 10**6)
    )
    def explore(script, seed):
        nonlocal done
        done += run(bound, script, seed)

    explore()
    assert done >= 10_000


def test_two_thousand_texts_in_a_row_leave_nothing(bound):
    session, texts, highest = bound.session(), {}, 0
    for number in range(2_000):
        texts[number] = ids_of(3 + number % 9, number)
        if len(texts) > 4:
            gone = next(iter(texts))
            del texts[gone]
            session.drop([gone])
        for key in texts:
            texts[key] = [*texts[key], 3 + number % 90]
        if number % 8 == 0:
            session.step(list(texts.items()))
        highest = max(highest, session.memory_bytes)
    one_row = 2 * 2 * 32 * (8 + 5) * 4  # layers, keys and values, width, ring, bytes
    assert highest <= 8 * one_row
    assert len(session.keys) <= 5


def test_a_long_prompt_is_read_only_as_far_back_as_the_body_sees(bound, monkeypatch):
    fed = []
    body_step = type(bound.calibrator.body).step

    def counted(self, states, *arguments):
        fed.append(tuple(states.shape[:2]))
        return body_step(self, states, *arguments)

    monkeypatch.setattr(type(bound.calibrator.body), "step", counted)
    session, texts = bound.session(), {"long": ids_of(4_000), "short": ids_of(6, 1), "middle": ids_of(8, 2)}
    check(bound, list(step(bound, session, texts)))
    assert sorted(fed) == [(1, bound.reach + 1), (2, 9)]
    fed.clear()
    texts = {key: [*ids, 7] for key, ids in texts.items()}
    check(bound, list(step(bound, session, texts)))
    assert fed == [(3, 1)], "one forward for texts of three lengths"


def test_leading_special_tokens_do_not_matter(bound):
    ids = ids_of(9)
    session = bound.session()
    said = session.step([("plain", ids), ("begun", [BOS, *ids]), ("padded", [PAD] * 70 + [BOS, *ids])])
    for row in (1, 2):
        torch.testing.assert_close(said.hidden[row], said.hidden[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_step_that_breaks_off_leaves_nothing_wrong_behind(bound, monkeypatch, error):
    """Out of memory or Ctrl-C at any block of the body; then an older text that shares a beginning goes on."""
    calls, forward = [0], Block.forward

    def breaking(self, *arguments):
        calls[0] += 1
        if calls[0] == breaking.at:
            raise error("now")
        return forward(self, *arguments)

    monkeypatch.setattr(Block, "forward", breaking)
    for at in range(1, 7):
        session = bound.session()
        texts = {"a": ids_of(12), "b": ids_of(30, 1), "c": ids_of(20, 2)}
        breaking.at = -1
        check(bound, list(step(bound, session, texts)))
        calls[0], breaking.at = 0, at
        grown = {"a": [*texts["a"], 5], "b": texts["b"][:28], "c": [*texts["c"], 6, 7]}

        def go_on(session=session, grown=grown):
            for extra in ([], [8], [8, 9]):
                session.step([(key, ids + extra) for key, ids in grown.items()])

        with pytest.raises(error):
            go_on()
        breaking.at = -1
        check(bound, list(step(bound, session, {"a": [*texts["a"][:11], 9], "b": texts["b"][:29], "d": ids_of(3)})))


def test_each_row_has_its_own_strength(bound):
    """Strength 0 leaves a row alone, whatever the others have."""
    texts = {key: ids_of(9, seed) for seed, key in enumerate("abc")}
    logits = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)) * 3
    said = bound.session().step(list(texts.items()))
    config = FusionConfig(alpha=2.0, candidates=0, mass_to_others=True)
    alpha = torch.tensor([0.0, 1.0, 3.0])
    fused = fuse(logits, said.log_scores, bound.covers, config, alpha=alpha)
    for row, value in enumerate(alpha.tolist()):
        one = bound.session().step([("x", texts["abc"[row]])])
        expected = fuse(
            logits[row : row + 1],
            one.log_scores,
            bound.covers,
            FusionConfig(alpha=value, candidates=0, mass_to_others=True),
        )
        torch.testing.assert_close(fused[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_a_list_of_tokens_gets_the_scores_of_the_whole(bound):
    said = bound.session().step([(key, ids_of(9, key)) for key in range(6)])
    for count in (3, 40, 500):
        places = torch.randint(0, 6, (count,), generator=torch.Generator().manual_seed(count)).sort().values
        ids = torch.randint(3, SIZE, (count,), generator=torch.Generator().manual_seed(count))
        order = (places * SIZE + ids).unique()
        places, ids = order // SIZE, order % SIZE
        found = said.log_scores_at(bound.heads, places, ids)
        for head in bound.heads:
            torch.testing.assert_close(found[head], said.log_scores(head)[places, ids], atol=1e-4, rtol=1e-4)


def test_a_step_costs_the_same_however_long_the_text_is(bound):
    """4,000 tokens against 200: the host's part is bounded, too."""
    times = {}
    for length in (200, 4_000):
        session, ids = bound.session(), ids_of(length)
        session.step([("x", ids)])
        best = 1.0
        for number in range(60):
            ids = [*ids, 3 + number]
            start = time.perf_counter()
            session.step([Request("x", ids[-bound.reach :], len(ids))])
            best = min(best, time.perf_counter() - start)
        times[length] = best
    assert times[4_000] < 3 * times[200]
