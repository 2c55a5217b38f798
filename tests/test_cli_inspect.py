"""`calibfuse inspect` and its core: a trace tells exactly what the fusion did, and shows it without surprises."""

import html.parser
import json
import math
import re

import pytest
import torch
from tiny_calibrators import make_calibrator
from tiny_checkpoints import BUNDLED, BUNDLED_CHECKPOINTS, save_bundle

from calibfuse.cli import main as cli
from calibfuse.errors import InputError
from calibfuse.fusion import FusionConfig
from calibfuse.inspection import describe_calibrator, mask_in_context, mask_pieces, trace_generation, trace_page
from calibfuse.inspection.spelling import TokenSpeller
from calibfuse.processor import CalibFusion

PROMPT = "The river and"
CONTRAST = FusionConfig(alpha=1.0, candidates=50)


@pytest.fixture(scope="module")
def model(tokenizer, tiny_llama):
    return tiny_llama(len(tokenizer), eos_token_id=None)


@pytest.fixture(scope="module")
def guide(tokenizer):
    return make_calibrator().bind(tokenizer)


@pytest.fixture
def make_fusion(guide):
    return lambda config=CONTRAST: CalibFusion(guide, config)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tokenizer, model):
    return save_bundle(tmp_path_factory.mktemp("bundle"), model, tokenizer)


@pytest.fixture
def run(bundle, monkeypatch, command_line):
    """A function: arguments -> (exit code, standard output, standard error)."""
    monkeypatch.setattr("calibfuse.hub._BUNDLED", bundle)

    return lambda *arguments: command_line("inspect", *arguments)


MODES = [
    CONTRAST,
    FusionConfig(alpha=2.0, candidates=0, one_sided=False),
    FusionConfig(mode="geometric", alpha=0.5),
    FusionConfig(mode="blend", alpha=0.3, candidates=7),
]


@pytest.mark.parametrize("config", MODES, ids=lambda config: f"{config.mode}-{config.candidates}")
def test_a_trace_agrees_with_the_fusion_of_the_whole_sequence(config, model, tokenizer, make_fusion):
    """Slow oracle: all positions in one pass, without the trace and without caches."""
    fusion = make_fusion(config)
    steps = trace_generation(model, tokenizer, fusion, PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=2)
    prompt_ids = tokenizer(PROMPT)["input_ids"]
    ids = torch.tensor([[*prompt_ids, *(step.token_id for step in steps)]])
    with torch.no_grad():
        logits = model(ids).logits
    plain = logits[0].log_softmax(-1)
    fused = make_fusion(config).fuse_logits(ids, logits)[0]
    assert len(steps) == 8
    for step in steps:
        row = step.position - 1
        assert step.token_id == int(fused[row].argmax())
        for each in step.candidates:
            assert each.plain == pytest.approx(float(plain[row, each.token_id]), abs=1e-4)
            assert each.fused == pytest.approx(float(fused[row, each.token_id]), abs=1e-4)
            assert each.shift == pytest.approx(each.fused - each.plain)
        divergence = float((fused[row].exp() * (fused[row] - plain[row])).sum())
        assert step.divergence == pytest.approx(divergence, abs=1e-3)
        distance = float((fused[row].exp() - plain[row].exp()).abs().sum()) / 2
        assert step.moved_mass == pytest.approx(distance, abs=1e-4)


def test_the_heads_are_those_of_the_bound_calibrator(model, tokenizer, guide, make_fusion):
    """Their log-probabilities, renormalised over the movable candidates, and contrast follows from them."""
    steps = trace_generation(model, tokenizer, make_fusion(), PROMPT, max_new_tokens=3, top=600, pad_token_id=2)
    ids = torch.tensor([[*tokenizer(PROMPT)["input_ids"], *(step.token_id for step in steps)]])
    said = {"calibrator": guide.log_probs(ids)[0], "reference": guide.reference_log_probs(ids)[0]}
    for step in steps:
        movable = [each for each in step.candidates if each.is_movable]
        assert 40 < len(movable) <= CONTRAST.candidates
        for head, log_probs in said.items():
            values = log_probs[step.position - 1, [each.token_id for each in movable]].log_softmax(-1)
            assert [each.heads[head] for each in movable] == pytest.approx(values.tolist(), abs=1e-3)
        disagreement = [(each, each.heads["calibrator"], each.heads["reference"]) for each in movable]
        # one-sided contrast: shifts are the clipped disagreement up to the constant of renormalisation
        constants = [
            each.shift - max(-CONTRAST.max_shift, min(0.0, own - reference)) for each, own, reference in disagreement
        ]
        assert max(constants) - min(constants) < 0.002
        still = [each for each in step.candidates if not each.is_movable]
        assert still
        assert all(not each.heads and each.shift == pytest.approx(0.0, abs=1e-4) for each in still)


def test_ranks_are_places_in_the_sorted_vocabulary(model, tokenizer, make_fusion):
    (step,) = trace_generation(model, tokenizer, make_fusion(), PROMPT, max_new_tokens=1, top=700, pad_token_id=2)
    assert len(step.candidates) == len(tokenizer)
    for rank, value in (("plain_rank", "plain"), ("fused_rank", "fused")):
        ordered = sorted(step.candidates, key=lambda each: -getattr(each, value))
        ranks = [getattr(each, rank) for each in ordered]
        assert ranks == sorted(ranks)
        assert ranks[0] == 1


def test_with_alpha_0_nothing_moves(model, tokenizer, make_fusion):
    steps = trace_generation(model, tokenizer, make_fusion(FusionConfig(alpha=0.0)), PROMPT, max_new_tokens=4)
    for step in steps:
        assert step.divergence == pytest.approx(0.0, abs=1e-6)
        assert all(each.shift == 0.0 and each.plain_rank == each.fused_rank for each in step.candidates)


def test_tracing_does_not_change_the_generation(model, tokenizer, make_fusion):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 10, "do_sample": True, "top_p": 0.9, "pad_token_id": 2}
    torch.manual_seed(5)
    expected = model.generate(ids, logits_processor=[make_fusion()], **options)[0, ids.shape[1] :].tolist()
    streamed = []
    steps = trace_generation(model, tokenizer, make_fusion(), PROMPT, seed=5, on_step=streamed.append, **options)
    assert streamed == steps
    assert [step.token_id for step in steps] == expected


def test_a_given_continuation_gives_the_trace_of_its_generation(model, tokenizer, make_fusion):
    """Checked for a text whose tokens are those that were generated."""
    fusion = make_fusion()
    ids = tokenizer(PROMPT + " the little town was")["input_ids"]
    traced = trace_generation(model, tokenizer, fusion, PROMPT, continuation=" the little town was")
    start = len(ids) - len(traced)
    assert [step.token_id for step in traced] == ids[start:]
    assert "".join(step.text for step in traced) == " the little town was"
    for number, step in enumerate(traced):
        (alone,) = trace_generation(model, tokenizer, fusion, ids[: start + number], max_new_tokens=1, do_sample=False)
        for one, other in zip(step.candidates, alone.candidates, strict=False):
            if one.token_id == other.token_id:
                assert one.fused == pytest.approx(other.fused, abs=1e-4)
        assert step.divergence == pytest.approx(alone.divergence, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "no token in the prompt"),
        ({"prompt": ["text"]}, "one row"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, "one row"),
        ({"top": 0}, "at least 1 candidate"),
        ({"num_beams": 2}, "one row"),
        ({"num_return_sequences": 2, "do_sample": True}, "one row"),
        ({"continuation": ""}, "adds no token"),
        ({"continuation": " a", "max_new_tokens": 3}, "no options"),
    ],
)
def test_what_cannot_be_traced_is_refused(options, message, model, tokenizer, make_fusion):
    arguments = {"prompt": PROMPT} | options
    with pytest.raises(InputError, match=message):
        trace_generation(model, tokenizer, make_fusion(), arguments.pop("prompt"), **arguments)


def test_a_prompt_may_be_a_tensor_of_one_row(model, tokenizer, make_fusion):
    row = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = trace_generation(model, tokenizer, make_fusion(), row[0].tolist(), **options)
    for prompt in (row, row[0]):
        found = trace_generation(model, tokenizer, make_fusion(), prompt, **options)
        assert [step.token_id for step in found] == [step.token_id for step in expected]


def test_excluded_tokens_are_null_in_json(model, tokenizer, make_fusion):
    steps = trace_generation(
        model, tokenizer, make_fusion(), PROMPT, max_new_tokens=2, top=650, suppress_tokens=[50, 51], do_sample=False
    )
    for step in steps:
        assert not {50, 51} & {each.token_id for each in step.candidates}
        json.dumps(step.to_dict(), allow_nan=False)


# ---- spelling and masking


def test_characters_split_over_tokens_appear_once(byte_fallback_tokenizer, byte_level_tokenizer, wrap_tokenizer):
    text = "a ☂ b 𝄞"
    for each in (byte_fallback_tokenizer, byte_level_tokenizer):
        tokenizer = wrap_tokenizer(each)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        speller = TokenSpeller(tokenizer)
        assert "".join(map(speller.stream(), ids)).strip() == text
        assert any("\\x" in speller.label(token_id) for token_id in ids)
        assert speller.label(1) == "</s>" or speller.label(2) == "</s>"
        assert speller.label(10**6) == "<id 1000000>"


def stars(text):
    return re.sub("heck", "h**k", text)


@pytest.mark.parametrize("cuts", [[4], [1, 2, 3], [9, 11], [10, 12, 13]])
def test_a_word_is_masked_in_every_piece(cuts):
    text = "what the heck now, heckler"
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert "".join(mask_pieces(pieces, stars)) == stars(text)


def test_a_piece_is_masked_as_the_word_it_ends():
    assert mask_in_context("what the he", "ck", stars) == "*k"
    assert mask_in_context("what the", " heck", stars) == " h**k"
    assert mask_in_context("what the he ", "ck", stars) == "ck"


# ---- the page


class Page(html.parser.HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_everything(model, tokenizer, make_fusion):
    prompt = 'The <script>alert("1")</script> & river'
    steps = trace_generation(model, tokenizer, make_fusion(), prompt, max_new_tokens=6, seed=0, pad_token_id=2)
    page = trace_page(steps, prompt=prompt, metadata={"target": "<b>name</b>"})
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 1
    assert "b" not in tags
    assert tags.count("details") == len(steps)
    assert prompt in parsed.text
    assert "<b>name</b>" in parsed.text
    for _, attributes in parsed.tags:
        assert not {"src", "onclick"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "http" not in page
    assert {a["href"] for tag, a in parsed.tags if tag == "a"} == {f"#step{n}" for n in range(1, len(steps) + 1)}


def test_the_page_masks_words_in_text_and_tables(model, tokenizer, make_fusion):
    steps = trace_generation(model, tokenizer, make_fusion(), "what the", continuation=" heck")
    page = trace_page(steps, prompt="what the", metadata={}, mask=stars)
    assert "heck" not in Page(page).text.replace("␣", " ")
    assert "h**k" in "".join(Page(page).text.split("\n"))


# ---- the command


def test_a_calibrator_is_described(run, bundle):
    code, out, _ = run()
    assert code == 0
    code, same, _ = run("--calibrator", str(bundle / "default-calibrator"))
    facts = describe_calibrator(
        make_calibrator(training={"name": "tiny", "settings": {"steps": 0}}, words={})  # as save_bundle makes it
    )
    assert same.splitlines()[1:] == out.splitlines()[1:]
    for expected in (
        facts["fingerprint"],
        "calibrator, reference",
        f"{facts['parameter_count']:,}",
        "name: tiny",
        "steps: 0",
    ):
        assert expected in out
    described = json.loads(run("--json")[1])
    assert described["fingerprint"] == facts["fingerprint"]
    assert described["parameter_count"] == sum(p.numel() for p in make_calibrator().parameters())
    assert described["shape"]["window"] == 8


def test_a_trace_is_printed_step_by_step(run):
    code, out, err = run(PROMPT, "--max-new-tokens", "3", "--top", "2")
    assert (code, err) == (0, "")
    assert len(re.findall(r"^step \d+: changed by", out, re.M)) == 3
    assert len(re.findall(r"^> ", out, re.M)) == 3
    assert "calibrator" in out
    assert "\x1b" not in out
    assert out.splitlines()[-1].startswith(PROMPT)


def test_a_trace_as_json(run):
    code, out, _ = run(PROMPT, "--max-new-tokens", "3", "--json", "--alpha", "2", "--greedy")
    assert code == 0
    record = json.loads(out)
    assert record["fusion"]["alpha"] == 2.0
    assert len(record["steps"]) == 3
    chosen = record["steps"][0]["chosen"]
    assert chosen["fused_rank"] == 1
    assert math.isclose(chosen["shift"], chosen["fused"] - chosen["plain"], abs_tol=1e-9)
    assert set(chosen["heads"]) == {"calibrator", "reference"}


def test_a_page_is_written_whole(run, tmp_path):
    path = tmp_path / "new" / "trace.html"
    code, out, _ = run(PROMPT, "--continuation", " the town", "--html", str(path))
    assert code == 0
    assert str(path) in out
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def test_offensive_words_are_masked_unless_asked(run):
    arguments = ["What the", "--continuation", " fuck is this"]
    masked, plain = run(*arguments)[1], run(*arguments, "--no-mask")[1]
    assert "fuck" not in masked
    assert "What the fuck is this" in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "page.html"], "needs one: calibfuse inspect"),
        (["--continuation", "x"], "needs one: calibfuse inspect"),
        (["a", "b"], "follows one prompt, got 2"),
        ([" "], "blank"),
        (["a", "--top", "0"], "--top"),
        (["a", "--alpha", "inf"], "alpha must be a number"),
        (["a", "--continuation", ""], "adds no token"),
        (["a", "--chat", "--continuation", "b"], "exclude"),
        (["a", "--html", "."], "is a folder"),
        (["--calibrator", "./no/such/folder"], "no checkpoint folder"),
        (["a", "--max-new-tokens", "300"], "256 positions"),
    ],
)
def test_bad_input_gives_one_sentence_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_an_unwritable_page_is_an_error(run, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run(PROMPT, "--max-new-tokens", "1", "--html", str(tmp_path / "file" / "page.html"))
    assert code == 2
    assert "Cannot write" in err


def test_the_bundled_models_can_be_inspected(capsys):
    missing = [each for each in BUNDLED_CHECKPOINTS if not (BUNDLED / each).is_dir()]
    if missing:
        pytest.skip(f"not trained yet: {', '.join(missing)}")
    assert cli.main(["inspect", "The man said", "--max-new-tokens", "3"]) == 0
    assert "step 3" in capsys.readouterr().out
