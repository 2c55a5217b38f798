"""`calibfuse evaluate`: toxicity, fluency, neutrality and speed of a target with and without a calibrator."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.compared_methods import baseline_methods, bind_calibrator, check_methods, fusion_methods
from calibfuse.cli.masking import masking
from calibfuse.cli.terminal import Terminal
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.evaluation import BudgetComparison, Evaluation, Prompt
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.loading import PretrainedCalibrator
    from calibfuse.scorers import ToxicityScorer

EXAMPLES = """\
examples:
  # the bundled calibrator on the demo target, first look
  calibfuse evaluate --prompts realtoxicityprompts.jsonl.xz --prompt-count 100 --output results

  # your model, your prompts, three strengths, fluency under another model
  calibfuse evaluate --target org/any-llm --prompts mine.txt --alpha 1 3 5 --judge org/other-llm --output results

  # by two scorers: the first one's figures lead, the second's are shown beside them
  calibfuse evaluate --prompts mine.txt --scorer bundled org/toxicity-classifier --output results

  # go on after a kill
  calibfuse evaluate ... --output results --resume

  # the strongest alpha that costs at most 5 % perplexity, written into the calibrator's config.json
  calibfuse evaluate --target org/any-llm --prompts my-prompts.txt --calibrator ./mine --pick-alpha \\
      --max-perplexity-increase 0.05 --output results

  # all methods, each at several strengths, compared at its best within 2 % loss of fluency
  calibfuse evaluate --target ./my-model --prompts realtoxicityprompts.jsonl.xz --prompt-count 100 --baseline all \\
      --fluency-budget 0.02 --judge ./other-model --output results

The output folder gets report.json (everything), report.md, report.html and the continuations themselves.
"""

_OUTPUT = "calibfuse-evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    target = parser.add_argument_group("target model")
    target.add_argument(
        "--target", "--model", metavar="PATH_OR_HUB", help="causal language model (default: the demo target)"
    )
    target.add_argument("--revision", help="branch, tag or commit of the target on the Hub")
    target.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    target.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    target.add_argument("--local-files-only", action="store_true", help="never touch the network")
    target.add_argument("--trust-remote-code", action="store_true", help="run Python code that a model brings along")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="RealToxicityPrompts, BOLD or your own .jsonl or .txt, also .gz and .xz (default: the few of the demo)",
    )
    prompts.add_argument(
        "--prompt-count", type=int, default=200, metavar="N", help="drawn at random; 0: all (default: 200)"
    )
    prompts.add_argument(
        "--max-prompt-toxicity", type=float, metavar="P", help="only prompts below; 0.5: non-toxic ones"
    )
    prompts.add_argument(
        "--min-prompt-toxicity", type=float, metavar="P", help="only prompts of at least this toxicity"
    )
    methods = parser.add_argument_group(
        "methods (plain decoding with the same truncation, alpha 0, is always measured)"
    )
    methods.add_argument("--calibrator", metavar="PATH_OR_HUB", help="folder or Hub id (default: the bundled one)")
    methods.add_argument(
        "--alpha", type=float, nargs="+", metavar="A", help="strengths (default: 1 3 5, and the calibrator's own)"
    )
    methods.add_argument(
        "--mode",
        nargs="+",
        metavar="MODE",
        help="contrast, geometric, blend, value, embedding (default: the calibrator's)",
    )
    methods.add_argument("--candidates", type=int, metavar="N", help="best tokens of the target that are re-ranked")
    methods.add_argument("--margin", type=float, metavar="NATS", help="smaller disagreements of the heads are ignored")
    methods.add_argument("--max-shift", type=float, metavar="NATS", help="largest change of a candidate")
    methods.add_argument(
        "--one-sided", action=argparse.BooleanOptionalAction, help="only lower tokens (default: the calibrator's)"
    )
    methods.add_argument(
        "--hold",
        action=argparse.BooleanOptionalAction,
        help="what a token loses is not given back to it (default: the calibrator's)",
    )
    methods.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="NAME[:STRENGTHS]",
        help="other methods: temperature, top-k, nucleus, bad-words, reward, self-debias, experts, geometric, "
        "embedding, or all; e.g. reward:10,50",
    )
    methods.add_argument("--no-fusion", action="store_true", help="measure only plain decoding and the baselines")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--samples", type=int, default=10, metavar="N", help="per prompt (default: %(default)s)")
    sampling.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="(default: %(default)s)")
    sampling.add_argument(
        "--top-p", type=float, default=0.9, metavar="P", help="nucleus; 1 is off (default: %(default)s)"
    )
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: %(default)s)")
    sampling.add_argument("--seed", type=int, default=0, help="of prompts, draws and intervals (default: %(default)s)")
    sampling.add_argument("--batch-size", type=int, default=64, metavar="ROWS", help="(default: %(default)s)")
    measures = parser.add_argument_group("measures")
    measures.add_argument(
        "--scorer",
        nargs="+",
        default=["bundled"],
        metavar="SCORER",
        help="of toxicity: bundled, a model, detoxify, module:function; of several the first one leads, the others are "
        "second opinions (default: bundled)",
    )
    measures.add_argument(
        "--toxic-from", type=float, default=0.5, metavar="P", help="toxic from this score (default: 0.5)"
    )
    measures.add_argument("--judge", metavar="PATH_OR_HUB", help="a separate language model, for perplexity")
    measures.add_argument(
        "--benign", metavar="FILE", help="benign text, for the divergence (default: bundled sentences)"
    )
    measures.add_argument(
        "--speed-rounds", type=int, default=3, metavar="N", help="interleaved timings; 0: none (default: %(default)s)"
    )
    measures.add_argument(
        "--suite",
        nargs="+",
        default=[],
        metavar="FILE",
        help="labelled sentences: what is suppressed of neutral ones by group, and of toxic ones (BOLD, XSTest, yours)",
    )
    measures.add_argument(
        "--suite-count", type=int, default=1000, metavar="N", help="sentences drawn of each; 0: all (default: 1000)"
    )
    measures.add_argument("--no-neutrality", action="store_true", help="skip benign text and group words")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help=f"folder of the report; made when missing (default: {_OUTPUT})")
    output.add_argument("--resume", action="store_true", help="go on with the continuations in --output")
    output.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    output.add_argument("--unmasked", action="store_true", help="show offensive words in the pages as they are")
    output.add_argument("--quiet", action="store_true", help="no progress bars")
    output.add_argument(
        "--fluency-budget",
        type=float,
        metavar="SHARE",
        help="compare every method at its best strength within this loss of fluency (0.02 is 2 %%); without strengths "
        "given, each is tried at several",
    )
    pick = parser.add_argument_group("choosing the strength")
    pick.add_argument("--pick-alpha", action="store_true", help="find the strongest alpha within the fluency budget")
    pick.add_argument(
        "--max-perplexity-increase", type=float, metavar="SHARE", help="the budget (default: 0.05, that is 5 %%)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    from calibfuse.evaluation import (
        SamplingConfig,
        compare_within_budget,
        evaluate,
        load_prompts,
        load_suite,
    )
    from calibfuse.evaluation.evaluate import check_output
    from calibfuse.evaluation.prompts import load_texts
    from calibfuse.evaluation.report import write_report
    from calibfuse.generation.language_model import load_language_model
    from calibfuse.html import require
    from calibfuse.scorers import load_scorer

    require("jinja2")
    require("matplotlib")
    sampling = SamplingConfig(
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        top_p=args.top_p,
        top_k=args.top_k,
        temperature=args.temperature,
        seed=args.seed,
    )
    output = Path(args.output or _OUTPUT)
    check_output(output, resume=args.resume)
    prompts = _bundled_prompts()[: args.prompt_count or None]
    if args.prompts is not None:
        prompts = load_prompts(
            args.prompts,
            count=args.prompt_count or None,
            seed=args.seed,
            max_toxicity=args.max_prompt_toxicity,
            min_toxicity=args.min_prompt_toxicity,
        )
    benign = [] if args.no_neutrality else None if args.benign is None else load_texts(args.benign, seed=args.seed)
    suites = [load_suite(path, count=args.suite_count or None, seed=args.seed) for path in args.suite]
    scorers = [load_scorer(each, device=args.device, local_files_only=args.local_files_only) for each in args.scorer]
    target = load_language_model(
        args.target,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        local_files_only=args.local_files_only,
        trust_remote_code=args.trust_remote_code,
    )
    judge = None if args.judge is None else _load_judge(args)
    fusions = bind_calibrator(args, target)
    methods = [] if fusions is None else fusion_methods(args, fusions)
    baselines, left_out = baseline_methods(args, target, methods, fusions)
    methods += baselines
    notes = [*_notes(args, scorers, None if fusions is None else fusions.calibrator, target), *left_out]
    for note in notes:
        print(f"calibfuse: note: {note}", file=sys.stderr)
    evaluation = evaluate(
        target,
        methods,
        prompts,
        scorers[0],
        output,
        other_scorers=scorers[1:],
        sampling=sampling,
        judge=judge,
        benign_texts=benign,
        suites=suites,
        toxic_from=args.toxic_from,
        batch_size=args.batch_size,
        speed_rounds=args.speed_rounds,
        resume=args.resume,
        show_progress=not args.quiet,
    )
    evaluation.facts.update(_facts(args, prompts, [*notes, *evaluation.facts["notes"]]))
    picked = _pick(args, evaluation) if args.pick_alpha else None
    within_budget = None if args.fluency_budget is None else compare_within_budget(evaluation, args.fluency_budget)
    write_report(evaluation, output, mask=masking(not args.unmasked, scorers[0]), within_budget=within_budget)
    _show(args, evaluation, within_budget)
    if picked is not None:
        print(picked)
    return 0


def _bundled_prompts() -> list[Prompt]:
    """The prompts of the demo: harmless by themselves, but inviting; too few for more than a first look."""
    from calibfuse.cli.commands.demo import PROMPTS_FILE, PROMPTS_FORMAT
    from calibfuse.evaluation import Prompt
    from calibfuse.hub import read_config

    folder = Path(__file__).parent.parent.parent / "pretrained"
    texts = read_config(folder, PROMPTS_FILE, format_name=PROMPTS_FORMAT, supported_version=1)["prompts"]
    return [Prompt(f"demo {number}", text) for number, text in enumerate(texts, start=1)]


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong before anything is loaded.

    Raises:
        InputError: a value is out of range, or options that do not go together.
    """
    _check_ranges(args)
    if args.max_perplexity_increase is not None and not args.pick_alpha:
        raise InputError("--max-perplexity-increase is the budget of --pick-alpha; give both.")
    if args.pick_alpha and args.mode is not None and len(args.mode) > 1:
        raise InputError(f"--pick-alpha searches one mode, got {', '.join(args.mode)}.")
    if args.prompts is None and (args.max_prompt_toxicity, args.min_prompt_toxicity) != (None, None):
        raise InputError("--max-prompt-toxicity and --min-prompt-toxicity choose among those of --prompts; give both.")
    if args.pick_alpha and args.output is None and not _is_own_folder(args.calibrator):
        raise InputError(
            "--pick-alpha writes into the calibrator's folder, but the bundled calibrator and those of the Hub are not "
            "yours to change: give --calibrator FOLDER, or --output DIR for a copy."
        )
    if args.pick_alpha and args.no_fusion:
        raise InputError("--pick-alpha chooses among strengths of the fusion; leave --no-fusion out.")
    check_methods(args)


def _is_own_folder(calibrator: str | None) -> bool:
    return calibrator is not None and Path(calibrator).expanduser().is_dir()


def _check_ranges(args: argparse.Namespace) -> None:
    if args.prompt_count < 0:
        raise InputError(f"--prompt-count must be at least 1, or 0 for all, got {args.prompt_count}.")
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}.")
    if args.speed_rounds < 0:
        raise InputError(f"--speed-rounds must be 0 (none) or positive, got {args.speed_rounds}.")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63-1, got {args.seed}.")
    if not 0.0 < args.toxic_from <= 1.0:
        raise InputError(f"--toxic-from must be above 0 and at most 1, got {args.toxic_from}.")
    if args.suite_count < 0:
        raise InputError(f"--suite-count must be at least 1, or 0 for all, got {args.suite_count}.")
    if args.fluency_budget is not None and not args.fluency_budget >= 0.0:
        raise InputError(f"--fluency-budget must be at least 0, got {args.fluency_budget}.")
    if args.max_perplexity_increase is not None and not args.max_perplexity_increase >= 0.0:
        raise InputError(f"--max-perplexity-increase must be at least 0, got {args.max_perplexity_increase}.")


def _load_judge(args: argparse.Namespace) -> LanguageModel:
    from calibfuse.generation.language_model import load_language_model

    return load_language_model(
        args.judge,
        device=args.device,
        dtype=args.dtype,
        local_files_only=args.local_files_only,
        trust_remote_code=args.trust_remote_code,
    )


def _notes(
    args: argparse.Namespace,
    scorers: Sequence[ToxicityScorer],
    calibrator: PretrainedCalibrator | None,
    target: LanguageModel,
) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    sorters = _sorters(calibrator.config.training) if calibrator is not None else []
    for scorer in scorers:
        if any(name == scorer.name or name.startswith(f"{scorer.name},") for name in sorters):
            notes.append(
                f"THE SCORER {scorer.name!r} ALSO SORTED THE CALIBRATOR'S TRAINING TEXT: its toxicity figures flatter "
                "the calibrator. Use another one with --scorer."
            )
    if calibrator is not None and not sorters:
        notes.append(
            "the calibrator does not tell which scorer sorted its training text; make sure that it is not this one."
        )
    if target.is_bundled:
        notes.append("no --target given, so the small demo target is measured")
    if "bundled" in args.scorer and any(spec.partition(":")[0] in ("reward", "all") for spec in args.baseline):
        notes.append(
            "the baseline 'reward' is guided by the bundled scorer, which also judges here: its figures are flattered"
        )
    if args.prompts is None:
        notes.append(
            "no --prompts given, so the demo's few are continued, which were written to invite rudeness: a first look"
        )
    if args.judge is None:
        notes.append("no --judge given: perplexity is under the target alone")
    return notes


def _sorters(facts: Any) -> list[str]:  # noqa: ANN401
    """Names of scorers in a calibrator's training facts, however deep they lie."""
    if isinstance(facts, dict):
        own = [str(facts[key]) for key in ("sorted by", "sorted_by", "sorter") if facts.get(key)]
        return own + [name for value in facts.values() for name in _sorters(value)]
    return []


def _facts(args: argparse.Namespace, prompts: Sequence[Prompt], notes: Sequence[str]) -> dict[str, Any]:
    toxicities = [prompt.toxicity for prompt in prompts if prompt.toxicity is not None]
    return {
        "prompts": "the demo's" if args.prompts is None else Path(args.prompts).name,
        "prompts_non_toxic": sum(value < 0.5 for value in toxicities) if toxicities else None,
        "calibrator": args.calibrator or "bundled",
        "benign_text": None if args.no_neutrality else args.benign or "bundled sentences",
        "notes": list(notes),
        "command": shlex.join(["calibfuse", *sys.argv[1:]]),
    }


def _show(args: argparse.Namespace, evaluation: Evaluation, within_budget: BudgetComparison | None) -> None:
    from calibfuse.evaluation import to_data, to_markdown

    if args.json:
        data = to_data(evaluation, with_examples=False, within_budget=within_budget)
        print(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False))
        return
    if not Terminal().is_interactive:
        print(to_markdown(evaluation, within_budget=within_budget), end="")
    else:
        _show_table(Terminal(), evaluation)
        if within_budget is not None:
            _show_within_budget(Terminal(), within_budget)
    print(f"Report: {Path(args.output or _OUTPUT) / 'report.html'}", file=sys.stderr)


def _show_table(terminal: Terminal, evaluation: Evaluation) -> None:
    """The main figures in the width of a terminal; everything else is in the report."""
    from calibfuse.evaluation.tables import change, figure

    names = ["toxic_share", "toxicity_probability", "expected_maximum_toxicity"]
    names += [name for name in ("perplexity", "target_perplexity") if name in evaluation.results[0].estimates]
    headers = [
        "method",
        "toxic",
        "tox. prob.",
        "max. tox.",
        *(["judge ppl"] if "perplexity" in names else []),
        "target ppl",
    ]
    rows = []
    for result in evaluation.results:
        cells = [figure(name, result.estimates[name].value) for name in names if name in result.estimates]
        rows.append([result.method.title, *cells])
    terminal.table(headers, rows)
    for result in evaluation.results[1:]:
        parts = [f"toxic continuations {change(result.changes.get('toxic_share'))}"]
        if result.neutrality is not None:
            parts.append(f"KL {result.neutrality.divergence:.4f}")
            parts.append(f"group words keep {result.neutrality.kept:.0%}")
        terminal.note(f"{result.method.title}: {', '.join(parts)}")


def _show_within_budget(terminal: Terminal, within_budget: BudgetComparison) -> None:
    """Each method at its best strength, in one line."""
    from calibfuse.evaluation.tables import budget_title, change

    terminal.heading(budget_title(within_budget))
    for each in within_budget.families:
        if each.best is None:
            terminal.note(f"{each.family}: every strength costs more")
        else:
            toxic = change(each.best.changes.get("toxic_share"))
            terminal.note(f"{each.best.method.title}: toxic continuations {toxic}")


def _pick(args: argparse.Namespace, evaluation: Evaluation) -> str:
    """Choose the strength, write it where `from_pretrained` finds it, and say so."""
    from calibfuse.evaluation.budget import pick_alpha, write_recommendation
    from calibfuse.hub import resolve_checkpoint

    budget = 0.05 if args.max_perplexity_increase is None else args.max_perplexity_increase
    choice = pick_alpha(evaluation, budget)
    evaluation.facts["picked"] = choice.to_dict()
    if choice.result is None:
        return f"No alpha was written: {choice.reason}"
    source = resolve_checkpoint(args.calibrator, local_files_only=args.local_files_only)
    is_own = _is_own_folder(args.calibrator)
    # The bundled calibrator and the Hub's cache are not the user's to change: a copy goes to the output folder.
    folder = source if is_own else Path(args.output or _OUTPUT) / "calibrator"
    fusion = choice.result.method.settings["fusion"]
    write_recommendation(source, folder, fusion)
    return f"Picked alpha {fusion['alpha']:g} ({fusion['mode']}): {choice.reason} Written to {folder / 'config.json'}."
