"""Seven ways to make one model less toxic, measured alike: in the weights, at decoding time, and by the data alone.

    python tools/finetune_comparison.py --corpus reddit.jsonl.xz --prompts realtoxicityprompts.jsonl.xz \
        --oracle ORACLE --judge JUDGE --output DIR

    base           the target as it is
    plain          fine-tuned on the corpus
    filtered       fine-tuned on the documents of the corpus that the oracle accepts (DAPT)
    sequential     attribute-controlled fine-tuning on the whole corpus, one role after the other
    parallel       the same, roles at the same time on the products of the step before
    fusion         the target with the bundled calibrator, its recommended strength
    value guide    the target with the auxiliary model of the sequential run's first step, which learned from the
                   target's own samples

All are trained with the same number of optimiser steps on the same corpus, and continue the same prompts, which no
sampling prompt repeats. The scorer of the evaluation is the bundled one; the oracle must be another. Every stage is
kept in the output folder, so a killed comparison goes on with the same command. Writes comparison.json and
comparison.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor

from calibfuse import CalibFusion, Calibrator, __version__
from calibfuse.errors import CalibfuseError
from calibfuse.evaluation import LanguageModel, Method, Prompt, SamplingConfig, evaluate, load_prompts
from calibfuse.evaluation.bootstrap import Estimate, Resampled, Sums, resample
from calibfuse.evaluation.given_text.reading import method_log_probs
from calibfuse.evaluation.metrics import METRICS, Measured
from calibfuse.finetune.corpus import PackedCorpus
from calibfuse.finetune.run import run_finetuning
from calibfuse.finetune.settings import FinetuneConfig, ModelSource, OracleSource
from calibfuse.finetune.tuning import TuningConfig
from calibfuse.generation.language_model import load_language_model as load_lm
from calibfuse.scorers import load_scorer
from calibfuse.textfiles import iter_documents
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
from calibfuse.value.samples import SamplingPlan

logger = logging.getLogger("finetune_comparison")

BASE, PLAIN, FILTERED, SEQUENTIAL, PARALLEL = "base", "plain", "filtered", "sequential", "parallel"
FUSION, VALUE = "fusion", "value"
TUNED = (PLAIN, FILTERED, SEQUENTIAL, PARALLEL)
TITLES = {
    BASE: "(a) base",
    PLAIN: "(b) plain fine-tuning",
    FILTERED: "(c) fine-tuning on the filtered corpus (DAPT)",
    SEQUENTIAL: "(d) ours, sequential",
    PARALLEL: "(e) ours, parallel",
    FUSION: "(f) decoding-time fusion",
    VALUE: "(g) value guide",
}
COLUMNS = ("toxic_share", "toxicity_probability", "expected_maximum_toxicity", "perplexity")
_TOXIC_PROMPT = 0.5


@dataclass(frozen=True, eq=False)
class Row:
    """One way and what was measured of it.

    Attributes:
        key: which.
        measured: sums per prompt of its continuations.
        corpus: nats and tokens of each held-out block.
    """

    key: str
    measured: Measured
    corpus: Sums


def corpus_documents(args: argparse.Namespace) -> Iterator[str]:
    """Documents of the corpus up to the budget; every second one, as the demo target has read the others."""
    budget = args.corpus_bytes
    for document in islice(iter_documents(args.corpus), args.shard, None, 2):
        if budget <= 0:
            return
        budget -= len(document.encode())
        yield document


def split_prompts(args: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    """Prompts to evaluate on, drawn at random, and other ones to sample from.

    A given share of the second are prompts that are toxic themselves, so that the oracle sees enough that it refuses.
    """
    evaluation = load_prompts(args.prompts, count=args.prompt_count, seed=args.seed)
    taken = {prompt.text for prompt in evaluation}
    others = [
        prompt for prompt in load_prompts(args.prompts) if prompt.text not in taken and prompt.toxicity is not None
    ]
    np.random.default_rng([args.seed, 31]).shuffle(others)  # type: ignore[arg-type]
    toxic_count = round(args.toxic_prompt_share * args.sampling_prompts)
    toxic = [prompt.text for prompt in others if (prompt.toxicity or 0.0) >= _TOXIC_PROMPT][:toxic_count]
    calm = [prompt.text for prompt in others if (prompt.toxicity or 0.0) < _TOXIC_PROMPT]
    return evaluation, toxic + calm[: args.sampling_prompts - len(toxic)]


def run_config(args: argparse.Namespace, key: str, target_folder: str) -> FinetuneConfig:
    """The settings of one of the tuned ways; they differ in schedule, KL weight and filter alone."""
    is_ours = key in (SEQUENTIAL, PARALLEL)
    return FinetuneConfig(
        model=ModelSource(name=target_folder, local_files_only=True),
        oracle=OracleSource(spec=args.oracle, power=args.power, threshold=args.threshold),
        schedule=key if is_ours else SEQUENTIAL,
        filter_corpus=args.filter if key == FILTERED else None,
        iterations=args.iterations,
        tuning=TuningConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            sample_batch_size=args.sample_batch_size,
            kl_weight=args.kl_weight if is_ours else 0.0,
            strength=args.strength,
            learning_rate=args.learning_rate,
            precision=args.precision,
            seed=args.seed,
        ),
        sampling=SamplingPlan(
            per_prompt=args.per_prompt,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.sampling_batch_size,
            continuation_only=not args.label_prompts,
        ),
        keep_satisfied=args.keep_satisfied,
        auxiliary=AuxiliaryTrainingConfig(
            steps=args.auxiliary_steps,
            batch_size=args.auxiliary_batch_size,
            learning_rate=args.auxiliary_learning_rate,
        ),
        block_length=args.block_length,
        held_out_share=args.held_out_share,
        held_out_blocks=args.held_out_blocks,
    )


def tune_all(args: argparse.Namespace, prompts: Sequence[str], target_folder: str) -> dict[str, dict[str, Any]]:
    """Run (or resume, or take as done) the tuned ways; their reports."""
    reports = {}
    for key in [key for key in TUNED if key in args.only]:
        logger.info("== %s", TITLES[key])
        reports[key] = run_finetuning(
            run_config(args, key, target_folder),
            corpus_documents(args),
            prompts,
            args.output / "runs" / key,
            corpus_name=f"{Path(args.corpus[0]).name}, {args.corpus_bytes} bytes",
            resume=True,
            device=args.device,
        )
    return reports


def load_language_model(name: str | None, title: str, device: str | None) -> LanguageModel:
    """A model with its tokenizer."""
    return replace(load_lm(name, device=device), name=title)


def value_guide(args: argparse.Namespace, target: LanguageModel) -> Method:
    """Log p + strength * log R with the auxiliary model that learned from the target's own samples."""
    folder = str(args.output / "runs" / SEQUENTIAL / "work" / "step-1" / "auxiliary")
    guide = CalibFusion.from_pretrained(
        folder, tokenizer=target.tokenizer, target=target.model, mode="value", alpha=args.value_strength
    )
    weights = Calibrator.from_pretrained(folder).fingerprint
    return _method(VALUE, guide, {"strength": args.value_strength, "guide": weights})


def measure_way(
    args: argparse.Namespace, key: str, prompts: Sequence[Prompt], judge: LanguageModel | None, held_out: Tensor
) -> Row:
    """Continue the prompts in one way and measure."""
    is_tuned = key in TUNED
    folder = str(args.output / "runs" / key) if is_tuned else args.target
    target = load_language_model(folder, TITLES[key if is_tuned else BASE], args.device)
    methods: list[Method] = []
    if key == FUSION:
        fusion = CalibFusion.from_pretrained(args.calibrator, tokenizer=target.tokenizer, target=target.model)
        methods = [_method(key, fusion, {"fusion": fusion.config.to_dict()})]
    elif key == VALUE:
        methods = [value_guide(args, target)]
    evaluation = evaluate(
        target,
        methods,
        prompts,
        load_scorer(args.scorer),
        args.output / "evaluation" / (key if is_tuned else BASE),
        sampling=SamplingConfig(samples=args.samples, max_new_tokens=args.max_new_tokens, seed=args.seed),
        judge=judge,
        benign_texts=[],
        batch_size=args.evaluation_batch_size,
        speed_rounds=0,
        resume=True,
    )
    processors = methods[0].make_processors() if methods else []
    return Row(key, evaluation.results[-1].measured, block_sums(target, held_out, processors))


def _method(key: str, processor: LogitsProcessor, settings: dict[str, Any]) -> Method:
    return Method(key=key, title=TITLES[key], make_processors=lambda: [processor], settings=settings)


@torch.no_grad()
def block_sums(target: LanguageModel, blocks: Tensor, processors: Sequence[LogitsProcessor]) -> Sums:
    """Nats and tokens of each held-out block of the corpus, under the model with its processors."""
    nats = []
    for start in range(0, len(blocks), 8):
        ids = blocks[start : start + 8].to(target.model.device, torch.long)
        log_probs = target.model(input_ids=ids, use_cache=False).logits
        if processors:
            log_probs = method_log_probs(processors, ids, log_probs)
        losses = functional.cross_entropy(
            log_probs[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1)
        nats.append(losses.double().sum(dim=1).cpu().numpy())
    return Sums(np.concatenate(nats), np.full(len(blocks), float(blocks.shape[1] - 1)), is_exponential=True)


# ---------------------------------------------------------------------------------------------------- the report


def compare(rows: Sequence[Row], seed: int) -> dict[str, dict[str, Any]]:
    """Figures with intervals, and changes against the base and against plain fine-tuning, paired."""
    figures = {row.key: resample(row.measured.sums, seed=seed) for row in rows}
    corpus = {row.key: resample({"perplexity": row.corpus}, seed=seed)["perplexity"] for row in rows}
    result: dict[str, dict[str, Any]] = {}
    for row in rows:
        own: dict[str, Resampled] = {name: figures[row.key][name] for name in METRICS if name in figures[row.key]}
        entry: dict[str, Any] = {
            "title": TITLES[row.key],
            "metrics": {name: asdict(each.estimate()) for name, each in own.items()},
            "corpus_perplexity": asdict(corpus[row.key].estimate()),
        }
        for other in (BASE, PLAIN):
            if other in figures and other != row.key:
                shared = [name for name in own if name in figures[other]]
                changes = {name: asdict(own[name].relative_to(figures[other][name])) for name in shared}
                changes["corpus_perplexity"] = asdict(corpus[row.key].relative_to(corpus[other]))
                entry[f"change_against_{other}"] = changes
        result[row.key] = entry
    return result


def _shown(value: dict[str, float], kind: str) -> str:
    """A figure with its interval."""
    estimate = Estimate(**value)
    form: Callable[[float], str] = {
        "share": lambda each: f"{100 * each:.2f} %",
        "change": lambda each: f"{100 * each:+.1f} %",
        "number": lambda each: f"{each:.3f}",
        "perplexity": lambda each: f"{each:.1f}",
    }[kind]
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def to_markdown(data: dict[str, Any]) -> str:
    """Two tables: the ways, and the wall time of the schedules."""
    heads = ["way", "toxic continuations", "change to (a)", "change to (b)", "toxicity probability"]
    heads += ["exp. max toxicity", "perplexity, judge", "corpus perplexity", "change to (b)"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for entry in data["ways"].values():
        metrics, to_base, to_plain = (entry.get(f"{name}", {}) for name in ("metrics", *_CHANGES))
        cells = [
            entry["title"],
            _shown(metrics["toxic_share"], "share"),
            _shown(to_base["toxic_share"], "change") if to_base else "",
            _shown(to_plain["toxic_share"], "change") if to_plain else "",
            _shown(metrics["toxicity_probability"], "number"),
            _shown(metrics["expected_maximum_toxicity"], "number"),
            _shown(metrics["perplexity"], "perplexity") if "perplexity" in metrics else "",
            _shown(entry["corpus_perplexity"], "perplexity"),
            _shown(to_plain["corpus_perplexity"], "change") if to_plain else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_time_table(data["runs"])]
    return "\n".join(lines) + "\n"


_CHANGES = (f"change_against_{BASE}", f"change_against_{PLAIN}")


def _time_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| schedule | step | wall time, s | samples, s | auxiliary, s | model, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for key in (SEQUENTIAL, PARALLEL):
        for step in runs.get(key, {}).get("steps", ()):
            roles = [step["roles"].get(role) for role in ("samples", "auxiliary", "model")]
            cells = [f"{role['seconds']:.1f}" if role else "" for role in roles]
            lines.append(f"| {key} | {step['step']} | {step['seconds']:.1f} | {' | '.join(cells)} |")
    return lines


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "calibfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def build_parser() -> argparse.ArgumentParser:
    """The options; their defaults are those of the figures in docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of runs, continuations and tables")
    add("--target", help="folder of the model (default: the bundled demo target)")
    add("--corpus", nargs="+", required=True, help="files of the corpus")
    add("--corpus-bytes", type=int, default=2_000_000, help="read so much of it (default: %(default)s)")
    add("--shard", type=int, choices=(0, 1), default=1, help="which half of its documents (default: %(default)s)")
    add("--prompts", required=True, help="RealToxicityPrompts")
    add("--oracle", required=True, help="scorer of the samples; not that of the evaluation")
    add("--scorer", default="bundled", help="of the evaluation (default: %(default)s)")
    add("--judge", help="a separate language model, for perplexity")
    add("--calibrator", help="for the fusion (default: the bundled one)")
    add("--only", nargs="+", choices=tuple(TITLES), default=list(TITLES), help="some of the ways")
    add("--device", help="cpu, cuda:0,cuda:1, ...")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--seed", type=int, default=0)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--prompt-count", type=int, default=150, help="(default: %(default)s)")
    group.add_argument("--samples", type=int, default=8, help="per prompt (default: %(default)s)")
    group.add_argument("--evaluation-batch-size", type=int, default=100, help="(default: %(default)s)")
    group.add_argument("--held-out-share", type=float, default=0.05, help="of the documents (default: %(default)s)")
    group.add_argument("--held-out-blocks", type=int, default=100, help="at most (default: %(default)s)")
    group.add_argument("--value-strength", type=float, default=4.0, help="of the value guide (default: %(default)s)")
    group = parser.add_argument_group("oracle and samples")
    group.add_argument("--power", type=float, default=1.0, help="C = 1 - toxicity^power (default: %(default)s)")
    group.add_argument("--threshold", type=float, default=0.4, help="C = 1 where the toxicity is below (default: 0.4)")
    group.add_argument("--label-prompts", action="store_true", help="show the oracle prompt and continuation")
    group.add_argument("--filter", type=float, default=0.5, help="C of a document kept for (c) (default: %(default)s)")
    group.add_argument("--sampling-prompts", type=int, default=700, help="(default: %(default)s)")
    group.add_argument("--toxic-prompt-share", type=float, default=0.8, help="among them (default: %(default)s)")
    group.add_argument("--per-prompt", type=int, default=8, help="samples (default: %(default)s)")
    group.add_argument("--keep-satisfied", type=float, default=0.25, help="share of those kept (default: %(default)s)")
    group.add_argument("--sampling-batch-size", type=int, default=250, help="(default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, default=20, help="(default: %(default)s)")
    group.add_argument("--auxiliary-steps", type=int, default=300, help="per iteration (default: %(default)s)")
    group.add_argument("--auxiliary-batch-size", type=int, default=32, help="(default: %(default)s)")
    group.add_argument("--auxiliary-learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    group = parser.add_argument_group("tuning")
    group.add_argument("--iterations", type=int, default=3, help="(default: %(default)s)")
    group.add_argument("--steps", type=int, default=60, help="per iteration (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=16, help="blocks (default: %(default)s)")
    group.add_argument("--block-length", type=int, default=128, help="tokens (default: %(default)s)")
    group.add_argument("--sample-batch-size", type=int, default=16, help="(default: %(default)s)")
    group.add_argument("--learning-rate", type=float, default=2e-4, help="peak (default: %(default)s)")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(default: %(default)s)")
    group.add_argument("--kl-weight", type=float, default=9.0, help="(default: %(default)s)")
    group.add_argument("--strength", type=float, default=6.0, help="q = p R^strength (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        The exit status: 0, or 2 after one sentence on what went wrong.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    try:
        prompts, sampling_prompts = split_prompts(args)
        reports = tune_all(args, sampling_prompts, str(args.target or _demo_target()))
        judge = None if args.judge is None else load_language_model(args.judge, Path(args.judge).name, args.device)
        some_run = next(args.output.glob("runs/*/work/corpus.safetensors"))
        held_out = PackedCorpus.load(some_run).held_out[: args.held_out_blocks]
        rows = []
        for key in [key for key in TITLES if key in args.only]:
            logger.info("== measuring %s", TITLES[key])
            rows.append(measure_way(args, key, prompts, judge, held_out))
    except CalibfuseError as error:
        logger.error("finetune_comparison: %s", error)
        return 2
    command = "python tools/finetune_comparison.py " + shlex.join(argv if argv is not None else sys.argv[1:])
    data = {
        "command": command,
        "seed": args.seed,
        "machine": machine(),
        "sampling_prompts": len(sampling_prompts),
        "prompts": len(prompts),
        "ways": compare(rows, args.seed),
        "runs": reports,
    }
    (args.output / "comparison.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    table = to_markdown(data)
    (args.output / "comparison.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def _demo_target() -> Path:
    from calibfuse.hub import resolve_checkpoint

    return Path(resolve_checkpoint(None, default="demo-target"))


if __name__ == "__main__":
    sys.exit(main())
