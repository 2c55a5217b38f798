"""A whole evaluation on tiny models: comparison, resuming, reports, and the choice of a strength."""

import html
import html.parser
import json
import math
import re
import sys
import tracemalloc
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tiny_calibrators import make_calibrator
from transformers import LogitsProcessor

from calibfuse.calibrator import Calibrator
from calibfuse.errors import InputError, MissingDependencyError, ScorerError
from calibfuse.evaluation import LanguageModel, Method, Prompt, SamplingConfig, evaluate, to_data, to_markdown
from calibfuse.evaluation.bootstrap import Estimate, Sums
from calibfuse.evaluation.budget import compare_within_budget, pick_alpha, write_recommendation
from calibfuse.evaluation.evaluate import run_stage
from calibfuse.evaluation.given_text.suites import LabelledText, Suite
from calibfuse.evaluation.metrics import Measured, _worst_part, measure
from calibfuse.evaluation.report import write_report
from calibfuse.evaluation.report.charts import PALETTE, Point, bars, curves
from calibfuse.evaluation.report.page import to_html
from calibfuse.evaluation.sampling import Journal, PromptRecord
from calibfuse.fusion import FusionConfig
from calibfuse.generation.decoding import Continuation
from calibfuse.html import render
from calibfuse.scorers import load_scorer

PROMPTS = [
    Prompt("line 1", "The river", 0.1),
    Prompt("line 2", "She said <b>that</b> & then", 0.2),
    Prompt("line 3", "A long walk through the town", 0.3),
]
SAMPLING = SamplingConfig(samples=4, max_new_tokens=5)
OPTIONS = {"sampling": SAMPLING, "resamples": 50, "speed_rounds": 1, "benign_texts": ["It rained all day."]}


class Lower(LogitsProcessor):
    """Lowers the ids from 300 on, which the scorer of these tests calls toxic."""

    def __init__(self, by):
        self.by = by

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 300:] -= self.by
        return scores


def lowering(by):
    config = FusionConfig(alpha=by)
    return Method(f"lower-{by:g}", f"lower by {by:g}", lambda: [Lower(by)], "lower", by, {"fusion": config.to_dict()})


@pytest.fixture(scope="module")
def scorer(target):
    def share_of_rare_ids(texts):
        rows = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [sum(token_id >= 300 for token_id in row) / max(1, len(row)) for row in rows]

    return load_scorer(share_of_rare_ids)


@pytest.fixture(scope="module")
def evaluation(target, scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate(target, [lowering(1.0), lowering(30.0)], PROMPTS, scorer, folder, judge=target, **OPTIONS)


def test_plain_comes_first_and_methods_are_compared_with_it(evaluation):
    plain, weak, strong = evaluation.results
    assert [result.method.key for result in evaluation.results] == ["plain", "lower-1", "lower-30"]
    assert plain.changes == plain.differences == {}
    assert plain.neutrality is None
    toxicity = [result.estimates["mean_toxicity"].value for result in (plain, weak, strong)]
    assert toxicity[0] > toxicity[1] > toxicity[2]
    assert strong.differences["mean_toxicity"].value == pytest.approx(toxicity[2] - toxicity[0])
    assert strong.changes["mean_toxicity"].value == pytest.approx(toxicity[2] / toxicity[0] - 1)
    assert 0.0 < weak.neutrality.divergence < strong.neutrality.divergence
    assert all(result.speed.tokens_per_second > 0 for result in evaluation.results)


def test_perplexity_is_under_the_judge_and_under_the_target(evaluation):
    for result in evaluation.results:
        assert 1.0 < result.estimates["perplexity"].value < math.inf
        assert 1.0 < result.estimates["target_perplexity"].value < math.inf


def test_a_method_that_does_nothing_changes_nothing(target, scorer, tmp_path):
    nothing = Method("nothing", "nothing", lambda: [Lower(0.0)])
    result = evaluate(target, [nothing], PROMPTS, scorer, tmp_path, **OPTIONS).results[1]
    for name, change in result.differences.items():
        assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0), name


def test_a_resumed_run_samples_reads_and_times_nothing_again(target, scorer, tmp_path, monkeypatch):
    methods = [lowering(2.0)]
    suite = Suite("mine", (LabelledText("The river was wide", False, "x"),))
    options = {**OPTIONS, "suites": [suite]}
    first = evaluate(target, methods, PROMPTS, scorer, tmp_path, **options)

    class Broken:
        name = scorer.name

        def score(self, texts):
            if len(texts) > 3:  # three texts tell versions of a scorer apart
                raise AssertionError("scored again")
            return scorer.score(texts)

    def forward(*_, **__):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(target.model, "forward", forward)
        again = evaluate(target, methods, PROMPTS, Broken(), tmp_path, resume=True, **options)
    assert again.results[1].neutrality == first.results[1].neutrality
    assert again.results[1].suites == first.results[1].suites
    assert again.results[1].speed == first.results[1].speed
    assert [each.estimates["mean_toxicity"] for each in again.results] == [
        each.estimates["mean_toxicity"] for each in first.results
    ]
    with pytest.raises(ScorerError, match="scored again"):
        evaluate(target, methods, PROMPTS[:2], Broken(), tmp_path, resume=True, **OPTIONS)


def test_a_folder_with_an_evaluation_is_not_overwritten(target, scorer, tmp_path):
    evaluate(target, [], PROMPTS, scorer, tmp_path, **OPTIONS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds an evaluation: go on with resume"):
        evaluate(target, [], PROMPTS[:1], scorer, tmp_path, **OPTIONS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_another_method_or_target_is_refused(target, scorer, tmp_path, tiny_llama):
    evaluate(target, [], PROMPTS, scorer, tmp_path, **OPTIONS)
    other = LanguageModel("tiny", tiny_llama(len(target.tokenizer), seed=1), target.tokenizer)
    with pytest.raises(InputError, match=r"other settings \(target_weights\)"):
        evaluate(other, [], PROMPTS, scorer, tmp_path, resume=True, **OPTIONS)


def test_resuming_with_other_prompts_under_the_same_ids_is_refused(target, scorer, tmp_path):
    """Ids are line numbers: another file has the same ones."""
    evaluate(target, [], PROMPTS, scorer, tmp_path, **OPTIONS)
    others = [replace(PROMPTS[0], text="The sea"), *PROMPTS[1:]]
    with pytest.raises(InputError, match="other prompts: 'line 1' has another text"):
        evaluate(target, [], others, scorer, tmp_path, resume=True, **OPTIONS)


def test_texts_that_are_too_long_are_refused_before_anything_is_sampled(target, scorer, tmp_path):
    long = "word " * 5000
    suite = Suite("mine", (LabelledText(long, False, "x"),))
    with pytest.raises(InputError, match="positions; shorten it"):
        evaluate(target, [], PROMPTS, scorer, tmp_path / "a", **{**OPTIONS, "benign_texts": [long]})
    with pytest.raises(InputError, match="positions; shorten it"):
        evaluate(target, [], PROMPTS, scorer, tmp_path / "b", suites=[suite], **OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: [0.5] * (len(texts) - 1), "array of shape"),
        (lambda texts: [math.nan] * len(texts), "returned nan"),
        (lambda texts: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["count", "nan", "raises"],
)
def test_a_failed_score_is_an_error_and_never_a_number(target, tmp_path, function, message):
    class Failing:
        name = "failing"

        def score(self, texts):
            return [0.5] * 3 if len(texts) == 3 else function(texts)

    with pytest.raises(ScorerError, match=message):
        evaluate(target, [], PROMPTS, Failing(), tmp_path, **OPTIONS)


def test_names_must_differ_and_there_must_be_prompts(target, scorer, tmp_path):
    with pytest.raises(InputError, match="method 'plain' was given twice"):
        evaluate(target, [Method("plain", "x", list)], PROMPTS, scorer, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="prompt 'line 1' was given twice"):
        evaluate(target, [], [PROMPTS[0], PROMPTS[0]], scorer, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="at least one prompt"):
        evaluate(target, [], [], scorer, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="key of a method"):
        Method("../x", "x", list)


# ---- second opinions


def slow_toxic_share(journal_path, scorer, toxic_from):
    with journal_path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file][1:]
    scores = [float(scorer.score([said["text"]])[0]) for record in records for said in record["continuations"]]
    return sum(score >= toxic_from for score in scores) / len(scores)


def test_every_scorer_is_counted_as_a_slow_loop_counts(target, scorer, tmp_path):
    def by_length(texts):
        return [min(1.0, len(text) / 20) for text in texts]

    other = load_scorer(by_length)
    found = evaluate(target, [lowering(1.0)], PROMPTS, scorer, tmp_path, other_scorers=[other], **OPTIONS)
    second = f"toxic_share ({other.name})"
    for result in found.results:
        place = tmp_path / "continuations" / f"{result.method.key}.jsonl"
        for name, chosen in (("toxic_share", scorer), (second, other)):
            assert result.estimates[name].value == pytest.approx(slow_toxic_share(place, chosen, 0.5))
        scores = [said.toxicity for said in result.measured.first]
        assert scores == pytest.approx(scorer.score([said.continuation for said in result.measured.first]))
    assert second in found.results[1].changes
    assert any("too few" in note and other.name in note for note in found.facts["notes"])
    text = to_markdown(found)
    header = next(line for line in text.splitlines() if line.startswith("| method |"))
    assert header.endswith(f"| mean toxicity ({other.name}) |")
    assert "by_length" in to_html(found)
    assert second in to_data(found)["methods"][1]["metrics"]


def test_a_second_opinion_is_scored_again_where_it_is_new(target, scorer, tmp_path):
    evaluate(target, [], PROMPTS, scorer, tmp_path, **OPTIONS)
    other = load_scorer(lambda texts: [0.6] * len(texts))
    found = evaluate(target, [], PROMPTS, scorer, tmp_path, other_scorers=[other], resume=True, **OPTIONS)
    assert found.results[0].estimates[f"toxic_share ({other.name})"].value == 1.0


def test_two_scorers_of_one_name_are_refused(target, scorer, tmp_path):
    with pytest.raises(InputError, match="given twice"):
        evaluate(target, [], PROMPTS, scorer, tmp_path, other_scorers=[scorer], **OPTIONS)


# ---- measures on disk


def test_a_stage_survives_its_file_and_other_settings_do_not_match(evaluation, tmp_path):
    measured = evaluation.results[1].measured

    def run(settings, found=None, *, resume=True):
        return run_stage(tmp_path / "m.json", Measured, settings, lambda: found, resume=resume)

    run({"a": [1, None]}, measured)
    found = run({"a": [1, None]})
    assert found.first == measured.first
    assert found.worst == measured.worst
    assert found.sums["perplexity"].is_exponential
    assert all(np.array_equal(found.sums[name].numerator, each.numerator) for name, each in measured.sums.items())
    other = replace(measured, first=())
    content = (tmp_path / "m.json").read_text()
    for text in (content[:-50], "[]", "{}", content.replace('"first"', '"frist"')):
        (tmp_path / "m.json").write_text(text)
        assert run({"a": [1, None]}, other) is other
    assert run({"a": [2, None]}, measured) is measured
    assert run({"a": [2, None]}, other, resume=False) is other


def test_memory_grows_by_numbers_per_prompt_and_never_by_text(tmp_path):
    """What measuring holds at its peak: 9 metrics take 144 bytes a prompt, twice while they are joined."""

    def peak(count):
        prompts = [Prompt(f"line {number}", "It was") for number in range(count)]
        journal = Journal(tmp_path / f"{count}.jsonl", {})
        said = tuple(Continuation(" a" * 50, tuple(range(50)), is_finished=False) for _ in range(20))
        for prompt in prompts:
            journal.append([PromptRecord(prompt.id, prompt.text, said)])
        scorer = load_scorer(lambda texts: [0.5] * len(texts))
        tracemalloc.start()
        measure(journal, prompts, [scorer])
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(64)  # what is loaded once
    per_prompt = (peak(512) - peak(128)) / (512 - 128)
    assert per_prompt < 1000  # the text and ids of one prompt take some 30,000


# ---- reports


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_data_are_strict_json_and_complete(evaluation):
    data = json.loads(json.dumps(to_data(evaluation), allow_nan=False))
    assert data["versions"]["torch"] == torch.__version__
    assert data["facts"]["sampling"]["seed"] == 0
    method = data["methods"][2]
    assert set(method["metrics"]["toxic_share"]) == {"value", "low", "high"}
    assert method["neutrality"]["kept_by_group"]
    assert method["change_against_plain"]["toxic_share"]["value"] <= 0
    assert len(method["first_examples"]) == 3
    assert "first_examples" not in to_data(evaluation, with_examples=False)["methods"][0]


def test_markdown_tables_have_equal_columns(evaluation):
    lines = to_markdown(evaluation).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 10
    for one, other in zip(lines, lines[1:], strict=False):
        if one.startswith("|") and other.startswith("|"):
            assert one.count(" | ") == other.count(" | ")


def test_notes_stand_in_the_markdown_as_sentences(evaluation):
    noted = replace(evaluation, facts={**evaluation.facts, "notes": ["one thing", "another"], "command": "x"})
    assert "- notes: one thing; another\n" in to_markdown(noted)


def test_the_page_needs_no_other_file_and_what_models_say_is_text(evaluation):
    page = Page()
    content = to_html(evaluation)
    page.feed(content)
    names = {tag for tag, _ in page.tags}
    assert "svg" in names
    assert names.isdisjoint({"script", "link", "img", "iframe", "b"})
    assert not re.search(r"""(src|href)="[^#]|url\([^#]|@import""", content)
    assert "She said <b>that</b> & then" in page.text


def test_few_prompts_give_no_verdict_and_few_toxic_continuations_a_note(evaluation):
    content = to_html(evaluation)
    assert not re.search(r'class="(good|bad)"', content)
    assert "none is coloured, as intervals over fewer than 50 prompts" in content
    assert "too few to compare shares of toxic continuations" in content
    many = replace(evaluation, prompts=evaluation.prompts * 17)
    assert re.search(r'<small class="good">-', to_html(many))


def test_changes_stand_whole_in_one_line_of_their_cell(evaluation):
    """A relative change keeps its interval's brackets."""
    changes = re.findall(r'<small class="\w*">([^<]*)</small>', to_html(evaluation))
    assert len(changes) > 10
    assert all(each.count("[") == each.count("]") for each in changes)


def test_markdown_has_mean_toxicity(evaluation):
    assert re.search(r"^\| method \|.* mean toxicity \|", to_markdown(evaluation), re.MULTILINE)


def test_the_worst_part_stands_beside_each_example(evaluation, scorer):
    for said in (*evaluation.results[0].measured.first, *evaluation.results[0].measured.worst):
        assert said.worst_part == _worst_part(scorer, said.continuation)
    worst = evaluation.results[0].measured.worst[0]
    assert worst.worst_part in worst.continuation
    assert f"{worst.toxicity:.2f}: “{html.escape(worst.worst_part)}”" in to_html(evaluation)
    shown = to_markdown(evaluation).partition("## The most toxic continuations")[2]
    assert " ".join(worst.worst_part.split()).replace("|", "\\|") in shown
    assert f"“{html.escape(worst.worst_part)}”" not in to_html(evaluation, mask=lambda text: "*" * len(text))


def test_of_other_scorers_it_is_the_worst_sentence():
    scorer = load_scorer(lambda texts: [0.9 if "fool" in text else 0.1 for text in texts])
    assert _worst_part(scorer, "It rained. You old fool! Then it\nstopped") == "You old fool!"
    assert _worst_part(scorer, "  ") == ""


def test_examples_are_masked_on_the_page(evaluation):
    said = evaluation.results[0].measured.first[0].continuation
    content = to_html(evaluation, mask=lambda text: "*" * len(text))
    assert "The river" not in content
    assert len(said) < 3 or said not in content


def test_reports_are_written_together(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["curve.svg", "report.html", "report.json", "report.md"]
    ElementTree.parse(tmp_path / "new" / "curve.svg")  # a file of its own


def figures_of(value, low=math.nan, high=math.nan):
    return Estimate(value, low, high)


def test_charts_place_points_and_take_missing_numbers():
    good = Point("1", figures_of(20.0, 19.0, 21.0), figures_of(0.1, 0.05, 0.2))
    bad = Point("2", figures_of(math.inf), figures_of(0.1))
    chart = curves({"<a>": [good, bad]}, x_title="x", y_title="y")
    assert len(marks(chart)) == 1
    assert "&lt;a&gt;" in chart.markup()
    assert "nan" not in chart.markup()
    assert curves({"a": [bad]}, x_title="x", y_title="y", origin=bad) is None
    chart = bars({"row": {"one": figures_of(0.5), "two": figures_of(math.nan)}}, title="t", reference=1.0)
    assert re.findall("<title>(.*?)</title>", chart.markup()) == ["row, one: 0.5"]
    assert "nan" not in chart.markup()
    assert bars({}, title="t") is None


def test_bars_go_both_ways():
    """Mean shifts of sentences are mostly below 0."""
    chart = bars({"a": {"m": figures_of(-2.0, -3.0, -1.0)}, "b": {"m": figures_of(0.5)}}, title="nats")
    low, high = chart.draw().axes[0].get_xlim()
    assert low < -3.0
    assert high > 0.5


def test_an_axis_of_nothing_but_zeros_has_a_height():
    zero = figures_of(0.0, 0.0, 0.0)
    origin = Point("plain", figures_of(20.0, 19.0, 21.0), zero)
    chart = curves({"a": [Point("1", figures_of(22.0), zero)]}, x_title="x", y_title="y", origin=origin)
    for drawn in (chart, bars({"a": {"m": zero}}, title="t", is_share=True), bars({"a": {"m": zero}}, title="t")):
        assert "e-" not in "".join(re.findall(r">([^<>]*)</text>", drawn.markup()))
    assert chart.draw().axes[0].get_ylim()[1] >= 0.01


def test_intervals_stay_within_the_axes():
    wide = Point("1", figures_of(20.0, 2.0, 300.0), figures_of(0.1, 0.0, 0.9))
    axes = curves({"a": [wide]}, x_title="x", y_title="y").draw().axes[0]
    assert axes.get_xlim()[0] <= 2.0
    assert axes.get_xlim()[1] >= 300.0
    assert axes.get_ylim()[1] >= 0.9


def marks(chart):
    """Where the marks of points lie: those that have a tooltip."""
    lines = chart.draw().axes[0].lines
    return [line.get_xydata()[0] for line in lines if (line.get_gid() or "").startswith("tip: ")]


def crowd(families):
    """Curves that start at one point and hardly part, as those of ten methods do."""
    return {
        f"method {number}": [
            Point(f"{alpha:g}", *(figures_of(value, 0.9 * value, 1.1 * value) for value in (x, y)))
            for alpha, x, y in (
                (alpha, 200.0 + alpha * (1 + number), 0.1 / (1 + alpha / (2 + number)))
                for alpha in (0.5, 1.0, 3.0, 5.0)
            )
        ]
        for number in range(families)
    }


def test_the_end_of_a_line_is_labelled_and_every_point_is_marked():
    origin = Point("plain", figures_of(200.0, 190.0, 210.0), figures_of(0.1, 0.08, 0.12))
    chart = curves(crowd(3), x_title="x", y_title="y", origin=origin)
    assert [text.get_text() for text in chart.draw().axes[0].texts] == ["5", "5", "5", "plain"]
    assert len(marks(chart)) == 1 + 4 * 3  # plain and the points


def test_every_family_has_a_colour_or_a_line_of_its_own():
    figure = curves(crowd(12), x_title="x", y_title="y").draw()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    assert len(labels) == 12
    assert len({(each.get_color(), each.get_linestyle()) for each in handles}) == 12
    assert len({(each.get_color(), each.get_marker()) for each in handles}) == 12


def test_the_default_strength_has_a_ring():
    points = [Point("1", figures_of(20.0), figures_of(0.1)), Point("2", figures_of(21.0), figures_of(0.05), True)]
    axes = curves({"a": points}, x_title="x", y_title="y").draw().axes[0]
    rings = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_gid() == "ring"]
    assert rings == [[21.0, 0.05]]


def test_perplexities_that_differ_much_are_on_a_logarithmic_axis():
    def axes(largest):
        points = [Point("", figures_of(x, x, x), figures_of(0.1)) for x in (10.0, largest / 2, largest)]
        return curves({"a": points}, x_title="perplexity", y_title="y").draw().axes[0]

    assert (axes(20.0).get_xscale(), axes(20.0).get_xlabel()) == ("linear", "perplexity")
    assert (axes(1000.0).get_xscale(), axes(1000.0).get_xlabel()) == ("log", "perplexity, logarithmic")


def test_colours_in_a_page_follow_its_style_and_a_file_brings_its_own(repository):
    chart = curves(crowd(2), x_title="x", y_title="y")
    assert not re.search("#[0-9a-f]{6}", chart.markup())
    assert "stroke: var(--c1)" in chart.markup()
    assert "stroke: #d1480f" in chart.svg()
    style = (repository / "calibfuse" / "html" / "base.html.jinja").read_text(encoding="utf-8")
    assert all(f"--c{number}: {colour};" in style for number, colour in enumerate(PALETTE))


@pytest.mark.parametrize(("package", "call"), [("matplotlib", "markup"), ("jinja2", "page")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, evaluation, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    chart = curves(crowd(1), x_title="x", y_title="y")
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'calibfuse\[eval\]'"):
        _ = chart.markup() if call == "markup" else render("evaluation/report/report.html.jinja")


def test_a_method_has_one_colour_on_the_whole_page(target, scorer, tmp_path):
    """Bars of the second family, by groups of words, are filled as the marks of its curve."""
    other = Method("other", "other", lambda: [Lower(2.0)], "other")
    evaluation = evaluate(target, [lowering(1.0), other], PROMPTS, scorer, tmp_path, **OPTIONS)
    content = to_html(evaluation)
    fills = re.findall(r"<title>[^<]*\bother[:,].*?fill: (var\(--\w+\))", content, re.DOTALL)
    assert len(fills) > 4
    assert set(fills) == {"var(--c1)"}


# ---- the choice of a strength


def with_figures(evaluation, changes):
    """The evaluation with perplexity changes put in by hand."""
    results = [evaluation.results[0]]
    for result, change in zip(evaluation.results[1:], changes, strict=True):
        figures = {"perplexity": Estimate(change, change, change)}
        figures |= {name: Estimate(0.0, 0.0, 0.0) for name in ("distinct_1", "distinct_2", "distinct_3")}
        results.append(replace(result, changes={**result.changes, **figures}))
    return replace(evaluation, results=tuple(results))


def with_toxic(evaluation, count):
    """The evaluation with so many toxic continuations of plain decoding."""
    plain = evaluation.results[0]
    sums = {**plain.measured.sums, "toxic_share": Sums(np.array([count, 0.0, 0.0]), np.full(3, 100.0))}
    results = (replace(plain, measured=replace(plain.measured, sums=sums)), *evaluation.results[1:])
    return replace(evaluation, results=results)


@pytest.mark.parametrize(
    ("changes", "budget", "picked"),
    [
        ((0.01, 0.04), 0.05, "lower-30"),
        ((0.01, 0.06), 0.05, "lower-1"),
        ((0.10, 0.06), 0.05, None),
        ((-0.2, 0.0), 0.0, "lower-30"),
    ],
)
def test_the_most_effective_strength_within_the_budget_is_picked(evaluation, changes, budget, picked):
    choice = pick_alpha(with_toxic(with_figures(evaluation, changes), 20), budget)
    assert (choice.result.method.key if choice.result else None) == picked
    assert ("largest strength that was tried" in choice.reason) == (picked == "lower-30")


@pytest.mark.parametrize("count", [0, 19])
def test_no_strength_is_picked_where_plain_decoding_says_too_little_toxic_text(evaluation, count):
    choice = pick_alpha(with_toxic(with_figures(evaluation, (0.0, 0.0)), count), 0.05)
    assert choice.result is None
    assert f"gave {count} toxic continuations" in choice.reason
    assert "nan" not in choice.reason


def test_no_strength_is_picked_whose_effect_may_be_chance(evaluation):
    changed = with_toxic(with_figures(evaluation, (0.0, 0.0)), 20)
    unsure = {"mean_toxicity": Estimate(-0.1, -0.3, 0.1)}
    results = [replace(each, differences={**each.differences, **unsure}) for each in changed.results[1:]]
    choice = pick_alpha(replace(changed, results=(changed.results[0], *results)), 0.05)
    assert choice.result is None
    assert "may change mean toxicity either way" in choice.reason


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ((0.01, 0.05), "lower-1"),
        ((0.04, 0.05), None),
        ((0.00, 0.01), "lower-30"),
        ((0.01, math.inf), "lower-1"),
        ((0.06, 0.01), "lower-30"),
    ],
)
def test_methods_are_compared_at_one_fluency(evaluation, changes, best):
    within_budget = compare_within_budget(with_figures(evaluation, changes), 0.02)
    (family,) = within_budget.families
    assert (family.best.method.key if family.best else None) == best
    assert "within a fluency budget of 2.0%" in to_markdown(evaluation, within_budget=within_budget)
    assert json.dumps(to_data(evaluation, within_budget=within_budget), allow_nan=False)


def test_the_page_compares_within_the_budget(evaluation):
    within_budget = compare_within_budget(with_figures(evaluation, (0.01, 0.05)), 0.02)
    assert "within a fluency budget of 2.0%" in to_html(evaluation, within_budget=within_budget)


def test_text_that_is_always_the_same_costs_fluency_at_any_perplexity(evaluation):
    changed = with_figures(evaluation, (-0.5, -0.9))
    duller = Estimate(-0.03, -0.04, -0.02)
    results = [*changed.results[:2], replace(changed.results[2], changes=changed.results[2].changes)]
    results[2].changes["distinct_2"] = duller
    (family,) = compare_within_budget(replace(changed, results=tuple(results)), 0.02).families
    assert family.best.method.key == "lower-1"


def test_a_change_against_nothing_is_a_dash(evaluation):
    """Where plain decoding says nothing toxic, relative changes have no value."""
    changed = with_figures(evaluation, (0.01, 0.05))
    nothing = {"toxic_share": Estimate(math.nan, math.nan, math.nan)}
    results = [replace(each, changes={**each.changes, **nothing}) for each in changed.results]
    without = replace(changed, results=tuple(results))
    within_budget = compare_within_budget(without, 0.02)
    assert "nan" not in to_markdown(without, within_budget=within_budget)
    assert json.dumps(to_data(without, within_budget=within_budget), allow_nan=False)


def test_a_negative_budget_is_refused(evaluation):
    with pytest.raises(InputError, match="at least 0"):
        compare_within_budget(evaluation, -0.1)
    with pytest.raises(InputError, match="at least 0"):
        pick_alpha(evaluation, -0.1)


def test_the_choice_is_written_where_from_pretrained_finds_it(tmp_path, target):
    from calibfuse.processor import CalibFusion

    source = make_calibrator().save_pretrained(tmp_path / "mine", dtype=torch.float32)
    weights = (source / "model.safetensors").read_bytes()
    fusion = FusionConfig(alpha=2.5, one_sided=False).to_dict()
    write_recommendation(source, tmp_path / "copy", fusion)
    assert Calibrator.from_pretrained(source).config.fusion == {}
    write_recommendation(source, source, fusion)
    for folder in (source, tmp_path / "copy"):
        assert (folder / "model.safetensors").read_bytes() == weights
        found = CalibFusion.from_pretrained(folder, tokenizer=target.tokenizer)
        assert (found.config.alpha, found.config.one_sided) == (2.5, False)
