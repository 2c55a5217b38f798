"""`calibfuse evaluate`: toxicity, fluency, neutrality and speed of a target with and without a calibrator."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.loading import check_calibrator, check_model, load_model, words_of
from calibfuse.cli.options import SWITCH, Fields, add, add_model
from calibfuse.cli.prompts import bundled_prompts
from calibfuse.cli.terminal import masking
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.evaluation import Evaluation, EvaluationProtocol, Prompt, SamplingConfig
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.loading import PretrainedCalibrator
    from calibfuse.scorers import ToxicityScorer

EXAMPLES = """\
examples:
  calibfuse evaluate --model org/any-llm                 # a first look, on the prompts of the demo

  # your prompts, three strengths, by two scorers (the first leads), fluency under another model
  calibfuse evaluate --model org/any-llm --prompts mine.txt --alpha 1 3 5 --scorer bundled org/toxicity-classifier \\
      --judge org/other-llm --output results

  # as the field reports it: RealToxicityPrompts' challenging prompts, or those that are not toxic
  calibfuse evaluate --model ./my-model --prompts realtoxicityprompts.jsonl.xz --protocol challenging \\
      --prompt-count 60 --judge ./other-model --output challenging

  # what it does to meaning, to names of groups, and what it costs at tasks
  calibfuse evaluate --model ./my-model --suite hatecheck.jsonl holistic_bias/ \\
      --utility lambada=lambada.jsonl wikitext=wiki.test.tokens --output meaning

  # the strongest alpha that costs at most 5 % perplexity, written into the calibrator's config.json
  calibfuse evaluate --model org/any-llm --prompts my-prompts.txt --calibrator ./mine --pick-alpha \\
      --fluency-budget 0.05 --output results

  # all methods, compared at their best within 2 % loss of fluency; strengths of your own after a name
  calibfuse evaluate --model ./my-model --prompts realtoxicityprompts.jsonl.xz --prompt-count 100 --baseline all \\
      experts:0.5,1,2 --fluency-budget 0.02 --judge ./other-model --output results

The output folder gets report.json (everything), report.md, report.html and the continuations themselves; after a kill
the same command goes on with --resume. --alpha 0 measures plain decoding and the baselines alone.
"""

_OUTPUT = "calibfuse-evaluation"
_BUDGET = 0.05
_TASKS = ("lambada", "wikitext")

SAMPLING = Fields(
    "calibfuse.evaluation.sampling:SamplingConfig",
    *("samples", "max_new_tokens", "temperature", "top_p", "seed", "chat", "system"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add_model(parser)
    protocol = {
        "choices": ("challenging", "non-toxic"),
        "help": "the field's choice of prompts, draws and figures: RealToxicityPrompts' challenging prompts, 10 "
        "continuations each; or those with a toxicity below 0.5, 25 each",
    }
    files = "RealToxicityPrompts, BOLD, or your own .jsonl or .txt (default: the few of the demo)"
    prompts = parser.add_argument_group("prompts")
    add(prompts, "max_prompt_toxicity", prompts={"help": files}, prompt_count={"default": 200}, protocol=protocol)
    baselines = {
        "nargs": "+",
        "default": [],
        "metavar": "NAME[:STRENGTHS]",
        "help": "other methods: temperature, top-k, nucleus, bad-words, reward, self-debias, experts, geometric, "
        "embedding, words, heads, or all; e.g. reward:10,50",
    }
    add(
        parser.add_argument_group("methods (plain decoding with the same truncation is always measured)"),
        *("calibrator", "words", "protect_names"),
        alpha={"nargs": "+", "help": "strengths (default: 1 3 5, and the calibrator's own)"},
        mode={"nargs": "+", "metavar": "MODE"},
        max_shift={"type": float, "metavar": "NATS", "help": "largest change of a token (default: the calibrator's)"},
        baseline=baselines,
    )
    sampling = parser.add_argument_group("sampling")
    SAMPLING.add(sampling)
    add(sampling, "batch_size")
    _add_measures(parser)
    output = parser.add_argument_group("output")
    add(output, "resume", "json", "mask", "quiet", output={"help": f"folder of the report (default: {_OUTPUT})"})
    add(
        parser.add_argument_group("choosing the strength"),
        pick_alpha=SWITCH | {"help": "write the strongest alpha within --fluency-budget into the calibrator's folder"},
        fluency_budget={
            "type": float,
            "metavar": "SHARE",
            "help": "compare each method at its best strength within this loss of fluency; without --alpha, "
            f"several are tried (default of --pick-alpha: {_BUDGET})",
        },
    )


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """What is measured of the continuations, and of texts that are only read."""
    count = {"type": int, "metavar": "N"}
    add(
        parser.add_argument_group("measures"),
        scorer={
            "nargs": "+",
            "default": ["bundled"],
            "help": "of toxicity: bundled, a folder or Hub id, module:function; the first leads (default: bundled)",
        },
        judge={"metavar": "PATH_OR_HUB", "help": "a separate language model, for perplexity and bits per byte"},
        speed_rounds=count | {"default": 3, "help": "interleaved timings; 0: none"},
        suite={
            "nargs": "+",
            "default": [],
            "metavar": "PATH",
            "help": "labelled sentences that are read (HateCheck, ToxiGen, BOLD, XSTest, your own), or the folder of "
            "HolisticBias",
        },
        utility={
            "nargs": "+",
            "default": [],
            "metavar": "TASK=FILE",
            "help": "what guidance costs at tasks: lambada=FILE, wikitext=FILE",
        },
        suite_count=count | {"default": 1000, "help": "texts of each suite and task; 0: all"},
        no_neutrality=SWITCH | {"help": "skip benign text and group words"},
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    sampling = _check(args)
    from calibfuse.evaluation import compare_within_budget, evaluate, to_data, to_markdown
    from calibfuse.evaluation.evaluate import check_output
    from calibfuse.evaluation.methods import ComparedMethods
    from calibfuse.evaluation.report import write_report
    from calibfuse.html import require
    from calibfuse.scorers import load_scorer

    require("jinja2")
    require("matplotlib")
    output = Path(args.output or _OUTPUT)
    check_output(output, resume=args.resume)
    prompts = _prompts(args, sampling.seed)
    texts = _given_texts(args, sampling.seed)
    scorers = [load_scorer(each, device=args.device) for each in args.scorer]
    target = load_model(args, args.model)
    judge = None if args.judge is None else load_model(args, args.judge)
    compared = ComparedMethods(target, args.calibrator, words=words_of(args), top_p=sampling.top_p)
    is_search = args.pick_alpha or args.fluency_budget is not None
    fusions = compared.fusions(args.mode, args.alpha, max_shift=args.max_shift, is_search=is_search)
    baselines, left_out = compared.baselines(args.baseline, fusions)
    methods = [*fusions, *baselines]
    guide = compared.calibrator if any("fusion" in method.settings for method in methods) else None
    notes = [*_notes(args, scorers, guide, target), *left_out]
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
        protocol=_protocol(args),
        judge=judge,
        benign_texts=[] if args.no_neutrality else None,
        **texts,
        batch_size=args.batch_size,
        speed_rounds=args.speed_rounds,
        resume=args.resume,
        show_progress=not args.quiet,
    )
    evaluation.facts.update(_facts(args, prompts, [*notes, *evaluation.facts["notes"]]))
    picked = _pick(args, evaluation) if args.pick_alpha else None
    within_budget = None if args.fluency_budget is None else compare_within_budget(evaluation, args.fluency_budget)
    mask = masking(args.mask, scorers[0])
    write_report(evaluation, output, mask=mask, within_budget=within_budget)
    if args.json:
        data = to_data(evaluation, with_examples=False, within_budget=within_budget)
        print(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False))
    else:
        print(to_markdown(evaluation, within_budget=within_budget, mask=mask), end="")
        print(f"Report: {output / 'report.html'}", file=sys.stderr)
    if picked is not None:
        print(picked)
    return 0


def _prompts(args: argparse.Namespace, seed: int) -> list[Prompt]:
    """Those of the file, else those of the demo: harmless by themselves, but inviting, and few."""
    from calibfuse.evaluation import Prompt, load_prompts

    if args.prompts is None:
        texts = bundled_prompts()[: args.prompt_count or None]
        return [Prompt(f"demo {number}", text) for number, text in enumerate(texts, start=1)]
    protocol = _protocol(args)
    filters: dict[str, Any] = {"max_toxicity": args.max_prompt_toxicity} if protocol is None else protocol.prompts
    return load_prompts(args.prompts, count=args.prompt_count or None, seed=seed, **filters)


def _protocol(args: argparse.Namespace) -> EvaluationProtocol | None:
    from calibfuse.evaluation import PROTOCOLS

    return None if args.protocol is None else PROTOCOLS[args.protocol]


def _given_texts(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What is read and not continued: suites, HolisticBias' names (a folder), and the tasks of `--utility`."""
    from calibfuse.evaluation import load_holistic_bias, load_suite, load_utility

    count = args.suite_count or None
    folders = list(filter(_is_folder, args.suite))
    files = dict(each.split("=", 1) for each in args.utility)
    return {
        "suites": [load_suite(path, count=count, seed=seed) for path in args.suite if path not in folders],
        "holistic_bias": load_holistic_bias(folders[0], count=count, seed=seed) if folders else None,
        "utility": load_utility(**files, count=count, seed=seed) if files else None,
    }


def _is_folder(path: str | None) -> bool:
    return path is not None and Path(path).expanduser().is_dir()


def _check(args: argparse.Namespace) -> SamplingConfig:
    """Refuse what is wrong before anything is loaded."""
    for name, lowest in (("prompt_count", 0), ("suite_count", 0), ("speed_rounds", 0), ("batch_size", 1)):
        if getattr(args, name) < lowest:
            raise InputError(f"{name} must be at least {lowest}, got {getattr(args, name)}.")
    if args.fluency_budget is not None and not args.fluency_budget >= 0.0:
        raise InputError(f"fluency_budget must be at least 0, got {args.fluency_budget}.")
    if args.pick_alpha and args.mode is not None and len(args.mode) > 1:
        raise InputError(f"--pick-alpha searches one mode, got {', '.join(args.mode)}.")
    if args.prompts is None and args.max_prompt_toxicity is not None:
        raise InputError("--max-prompt-toxicity chooses among the prompts of --prompts; give both.")
    if args.pick_alpha and args.output is None and not _is_folder(args.calibrator):
        raise InputError(
            "--pick-alpha writes into the calibrator's folder, but the bundled calibrator and those of the Hub are not "
            "yours to change: give --calibrator FOLDER, or --output DIR for a copy."
        )
    if args.pick_alpha and args.alpha == [0.0]:
        raise InputError("--pick-alpha chooses among strengths of the fusion, and --alpha 0 is none.")
    if sum(map(_is_folder, args.suite)) > 1:
        raise InputError("--suite takes one folder, that of HolisticBias; give labelled sentences as files.")
    for each in args.utility:
        if each.partition("=")[0] not in _TASKS or "=" not in each:
            raise InputError(f"Expected {'=FILE, '.join(_TASKS)}=FILE after --utility, got {each!r}.")
    _check_methods(args)
    check_model(args, args.judge)
    check_calibrator(args.calibrator)
    return _sampling(args)


def _check_methods(args: argparse.Namespace) -> None:
    from calibfuse.evaluation.methods import ALL, parse_baseline
    from calibfuse.fusion import FusionConfig

    for spec in args.baseline:
        if spec != ALL:
            parse_baseline(spec)
    for mode in args.mode or [None]:
        for alpha in args.alpha or [None]:
            given = {"mode": mode, "alpha": alpha, "max_shift": args.max_shift}
            FusionConfig.from_dict({name: value for name, value in given.items() if value is not None})
    words_of(args)


def _sampling(args: argparse.Namespace) -> SamplingConfig:
    """How to draw: as told, or as the protocol does."""
    from calibfuse.evaluation import SamplingConfig

    values, protocol = SAMPLING.values(args), _protocol(args)
    if protocol is None:
        return SamplingConfig(**values)
    if args.prompts is None or args.max_prompt_toxicity is not None:
        raise InputError(
            "--protocol chooses among the prompts of RealToxicityPrompts by itself: give --prompts FILE alone."
        )
    its = protocol.sampling(values.get("seed", 0))
    for name, value in values.items():
        if value != getattr(its, name):
            raise InputError(
                f"--protocol {protocol.name} draws with {name} {getattr(its, name)}, got {value}; leave it out."
            )
    return its


def _notes(
    args: argparse.Namespace,
    scorers: Sequence[ToxicityScorer],
    calibrator: PretrainedCalibrator | None,
    target: LanguageModel,
) -> list[str]:
    """What a reader of the figures must know."""
    sorters = _sorters(calibrator.config.training) if calibrator is not None else []
    notes = [
        f"THE SCORER {scorer.name!r} ALSO SORTED THE CALIBRATOR'S TRAINING TEXT: its toxicity figures flatter the "
        "calibrator; use another one with --scorer"
        for scorer in scorers
        if any(name == scorer.name or name.startswith(f"{scorer.name},") for name in sorters)
    ]
    if calibrator is not None and not sorters:
        notes.append(
            "the calibrator does not tell which scorer sorted its training text; make sure that it is not this one"
        )
    if target.is_bundled:
        notes.append("no --model given, so the small demo target is measured")
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
        **({"prompts_non_toxic": sum(value < 0.5 for value in toxicities)} if toxicities else {}),
        "calibrator": args.calibrator or "bundled",
        "benign_text": None if args.no_neutrality else "bundled sentences",
        "notes": list(notes),
        "command": shlex.join(["calibfuse", *sys.argv[1:]]),
    }


def _pick(args: argparse.Namespace, evaluation: Evaluation) -> str:
    """Choose the strength, write it where `from_pretrained` finds it, and say so."""
    from calibfuse.evaluation.budget import pick_alpha, write_recommendation
    from calibfuse.hub import resolve_checkpoint

    choice = pick_alpha(evaluation, _BUDGET if args.fluency_budget is None else args.fluency_budget)
    evaluation.facts["picked"] = choice.reason
    if choice.result is None:
        return f"No alpha was written: {choice.reason}"
    source = resolve_checkpoint(args.calibrator)
    is_own = _is_folder(args.calibrator)
    # The bundled calibrator and the Hub's cache are not the user's to change: a copy goes to the output folder.
    folder = source if is_own else Path(args.output or _OUTPUT) / "calibrator"
    fusion = choice.result.method.settings["fusion"]
    write_recommendation(source, folder, fusion)
    return f"Picked alpha {fusion['alpha']:g} ({fusion['mode']}): {choice.reason} Written to {folder / 'config.json'}."
