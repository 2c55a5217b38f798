"""The transformer body against attention written as loops, and its cache against recomputation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse.calibrator.body import Body, KeyValueRing, rotary_tables, window_mask

WINDOW, WIDTH, LAYERS, HEADS = 6, 16, 2, 2


@pytest.fixture(scope="module")
def body():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = Body(width=WIDTH, layer_count=LAYERS, head_count=HEADS, hidden_width=24, window=WINDOW).double().eval()
        with torch.no_grad():
            for parameter in body.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5 * 1.5)
    return body.requires_grad_(False)


@pytest.fixture
def small_slack(monkeypatch):
    monkeypatch.setattr(KeyValueRing, "slack", 3)


def random_states(rows, slots, seed=0):
    return torch.randn(rows, slots, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normalise(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turn(vector, position):
    """Rotary position by complex numbers: channel i and channel i + half are one number, turned by its frequency."""
    half = len(vector) // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half).double(), position * frequency)
    return torch.cat([turned.real, turned.imag])


def slow_body(body, states, start=0):
    """One row [slots, width], slot by slot, from its boundary on: [slots - start, width]."""
    stream = list(states[start:])
    for block in body.blocks:
        width = len(stream[0])
        projected = [block.qkv.weight @ normalise(x, block.attention_norm.weight) for x in stream]
        mixed = []
        for j, own in enumerate(projected):
            heads = []
            for head in range(block.head_count):
                size = width // block.head_count
                part = slice(head * size, (head + 1) * size)
                query = turn(own[:width][part], float(j))
                seen = range(max(0, j - body.window + 1), j + 1)
                logits = torch.stack([query @ turn(projected[i][width : 2 * width][part], float(i)) for i in seen])
                weights = (logits / size**0.5).softmax(0)
                heads.append(sum(w * projected[i][2 * width :][part] for w, i in zip(weights, seen, strict=True)))
            mixed.append(torch.cat(heads))
        stream = [x + block.attention_out.weight @ m for x, m in zip(stream, mixed, strict=True)]
        stream = [
            x
            + block.down.weight
            @ torch.nn.functional.gelu(block.up.weight @ normalise(x, block.mlp_norm.weight), approximate="tanh")
            for x in stream
        ]
    return torch.stack(stream)


@pytest.mark.parametrize("slots", [1, 5, WINDOW, 4 * WINDOW + 1])
def test_equals_loops_over_slots_heads_and_window(body, slots):
    states = random_states(2, slots)
    result = body(states, torch.zeros(2, dtype=torch.int64))
    for row in range(2):
        torch.testing.assert_close(result[row], slow_body(body, states[row]), atol=1e-5, rtol=1e-5)


def test_slots_before_the_start_are_invisible(body):
    states, starts = random_states(3, 15), torch.tensor([0, 3, 9])
    result = body(states, starts)
    for row, start in enumerate(starts.tolist()):
        torch.testing.assert_close(result[row, start:], slow_body(body, states[row], start), atol=1e-5, rtol=1e-5)
    assert result.isfinite().all()


def test_positions_are_relative(body):
    """The same slots further to the right give the same states: padding does not matter."""
    states = random_states(1, 10)
    shifted = torch.cat([random_states(1, 700, seed=1), states], dim=1)
    result = body(shifted, torch.tensor([700]))[:, 700:]
    torch.testing.assert_close(result, body(states, torch.tensor([0])), atol=1e-4, rtol=1e-4)


def test_the_window_is_a_window(body):
    """With 2 layers a state depends on the last 2 * (window - 1) + 1 slots and on nothing before."""
    states = random_states(1, 40)
    changed = states.clone()
    reach = LAYERS * (WINDOW - 1)
    changed[:, : 39 - reach] += 1.0
    starts = torch.zeros(1, dtype=torch.int64)
    assert torch.allclose(body(states, starts)[:, -1], body(changed, starts)[:, -1], atol=1e-12)
    changed[:, 39 - reach] += 1.0
    assert not torch.allclose(body(states, starts)[:, -1], body(changed, starts)[:, -1], atol=1e-12)


def test_rows_do_not_see_each_other(body):
    states, starts = random_states(4, 12), torch.tensor([0, 1, 0, 4])
    together = body(states, starts)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], body(states[row : row + 1], starts[row : row + 1]))


def test_mask_as_a_table():
    """Window 3, row starting at slot 1: slot 0 sees itself only; slot 4 sees 2, 3 and 4."""
    mask = window_mask(torch.tensor([1]), first_query=0, first_key=0, slots=5, window=3)
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[0, 0].int().tolist() == expected
    one = window_mask(torch.tensor([1, 4]), first_query=4, first_key=2, slots=5, window=3)
    assert one[:, 0].int().tolist() == [[[1, 1, 1]], [[0, 0, 1]]]


def test_rotary_tables_are_cosines_and_sines_of_position_times_frequency():
    cosines, sines = rotary_tables(5, 4, device=torch.device("cpu"))
    angles = torch.tensor([[p * 1.0, p * 0.01] for p in range(5)])
    cosines, sines = cosines[:, 0, 0], sines[:, 0, 0]
    torch.testing.assert_close(cosines[:, :2], angles.cos())
    torch.testing.assert_close(sines[:, -2:], angles.sin())
    torch.testing.assert_close(sines[:, :2], -angles.sin())
    torch.testing.assert_close(cosines.square() + sines.square(), torch.ones(5, 4))


class Follower:
    """A ring under test, with everything needed to compute its states from scratch: texts of different lengths."""

    def __init__(self, body, rows, seed):
        self.body = body
        self.generator = torch.Generator().manual_seed(seed)
        self.ring = KeyValueRing(LAYERS, WINDOW)
        self.ring.resize(rows)
        self.inputs = [torch.zeros(0, WIDTH, dtype=torch.float64) for _ in range(rows)]
        self.highest = [0] * rows

    def extend(self, counts):
        """Feed counts[i] new slots of row i; rows with 0 are left out."""
        rows = [row for row, count in enumerate(counts) if count]
        if not rows:
            return
        new = torch.randn(len(rows), max(counts), WIDTH, dtype=torch.float64, generator=self.generator)
        before = [len(self.inputs[row]) for row in rows]
        used = [counts[row] for row in rows]
        result = self.body.step(new, self.ring, rows, before, used)
        for at, row in enumerate(rows):
            self.inputs[row] = torch.cat([self.inputs[row], new[at, : used[at]]])
            self.highest[row] = max(self.highest[row], len(self.inputs[row]))
            expected = self.body(self.inputs[row][None], torch.zeros(1, dtype=torch.int64))[0, -used[at] :]
            torch.testing.assert_close(result[at, : used[at]], expected, atol=1e-5, rtol=1e-5)

    def cut(self, row, slots):
        slots = min(max(1, slots), len(self.inputs[row]))
        if not self.ring.can_return_to(slots, self.highest[row]):
            assert self.highest[row] - slots > self.ring.slack, "rolling back less than the slack must always work"
            return
        self.inputs[row] = self.inputs[row][:slots]

    def copy(self, source, target):
        self.ring.copy([source], [target])
        self.inputs[target], self.highest[target] = self.inputs[source], self.highest[source]


counts = st.lists(st.integers(0, 12), min_size=3, max_size=3)
steps = st.one_of(
    st.tuples(st.just("extend"), counts),
    st.tuples(st.just("extend"), st.lists(st.integers(0, 1), min_size=3, max_size=3)),
    st.tuples(st.just("cut"), st.tuples(st.integers(0, 2), st.integers(0, 8))),
    st.tuples(st.just("copy"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), script=st.lists(steps, max_size=25))
def test_any_sequence_of_extending_rolling_back_and_copying(body, seed, script):
    slack, KeyValueRing.slack = KeyValueRing.slack, 3
    try:
        follower = Follower(body, 3, seed)
        follower.extend([4, 1, 9])
        for action, numbers in script:
            if action == "extend":
                follower.extend(numbers)
            elif action == "cut":
                follower.cut(numbers[0], len(follower.inputs[numbers[0]]) - numbers[1])
            else:
                follower.copy(*numbers)
        follower.extend([1, 1, 1])
    finally:
        KeyValueRing.slack = slack


def test_long_texts_keep_a_bounded_cache(body, small_slack):
    follower = Follower(body, 2, 0)
    follower.extend([5, 1])
    memory = follower.ring.memory_bytes
    for _ in range(60):
        follower.extend([1, 1])
    follower.extend([30, 1])
    follower.extend([1, 0])
    assert follower.ring.memory_bytes == memory == LAYERS * 2 * 2 * WIDTH * (WINDOW + 3) * 8


def test_room_is_given_back_and_taken_again(body, small_slack):
    follower = Follower(body, 3, 1)
    follower.extend([9, 2, 20])
    follower.ring.resize(1)
    follower.inputs, follower.highest = follower.inputs[:1], follower.highest[:1]
    follower.extend([1])
    follower.ring.resize(2)
    follower.inputs.append(torch.zeros(0, WIDTH, dtype=torch.float64))
    follower.highest.append(0)
    follower.extend([1, 7])
    follower.ring.resize(0)
    assert follower.ring.memory_bytes == 0


def test_cutting_back_further_than_the_slack_is_refused_in_advance(body, small_slack):
    ring = KeyValueRing(LAYERS, WINDOW)
    assert ring.can_return_to(40 - 1 - 3, 40)
    assert not ring.can_return_to(40 - 1 - 4, 40)
    assert not ring.can_return_to(1, WINDOW + 4)
    assert ring.can_return_to(1, WINDOW + 3)  # nothing is overwritten yet


def test_gradients_reach_every_weight():
    fresh = Body(width=WIDTH, layer_count=LAYERS, head_count=HEADS, hidden_width=24, window=WINDOW)
    fresh(torch.randn(2, 9, WIDTH), torch.tensor([0, 2])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in fresh.parameters())


def test_lower_precision_stays_close(body):
    states, starts = random_states(2, 20), torch.tensor([0, 5])
    expected = body(states, starts)
    rounded = copy.deepcopy(body).bfloat16()(states.bfloat16(), starts)
    assert rounded.dtype == torch.bfloat16
    relative = (rounded.double() - expected)[:, 5:].norm() / expected[:, 5:].norm()
    assert relative < 0.05
