"""How much of the source paper's fusion (mode "embedding") is a temperature that comes with it.

    calibfuse align --calibrator DIR --target MODEL
    python examples/measure_hidden_temperature.py --calibrator DIR --target MODEL \
        --prompts realtoxicityprompts.jsonl.xz --text wikitext2-valid.txt --output results

Three methods for each alpha, against the plain target on the same prompts with the same draws:

    temperature    the target at temperature 1 / (1 - alpha), nothing mixed in
    published      mode "embedding" as published
    weight 1       mode "embedding" with hidden_temperature=False

All tokens can be drawn (top-p is off unless asked for), since truncation hides a temperature. On the text, with nothing
sampled: entropy of the next token, and divergence from the target. The published method's changes are the sum of a
part that the temperature has as well and of a part that is due to the calibrator.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor
from transformers import LogitsProcessor

from calibfuse import CalibFusion
from calibfuse.cli.target import load_target
from calibfuse.evaluation import LanguageModel, Method, MethodResult, SamplingConfig, evaluate, load_prompts
from calibfuse.evaluation.neutrality import method_log_probs
from calibfuse.evaluation.prompts import load_texts
from calibfuse.evaluation.report import write_report
from calibfuse.scorers import load_scorer

PLAIN, TEMPERATURE, PUBLISHED, WEIGHT_ONE = "plain", "temperature", "published", "weight 1"


class TemperatureOnly(LogitsProcessor):
    """The control: the temperature of mode "embedding", without a calibrator."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities, shape of the scores, whatever it is."""
        return ((1.0 - self.alpha) * scores.float()).log_softmax(dim=-1)

    fuse_logits = __call__


def main() -> None:
    """Measure, print a Markdown table, write the full report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrator", help="folder or Hub id (default: the bundled one)")
    parser.add_argument("--target", help="folder or Hub id (default: the demo target)")
    parser.add_argument("--prompts", required=True, help="RealToxicityPrompts or your own")
    parser.add_argument("--prompt-count", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10, help="per prompt (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off (default: %(default)s)")
    parser.add_argument("--text", help="held-out text for entropy and divergence (default: bundled sentences)")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1, 0.3, 0.6], help="(default: 0.1 0.3 0.6)")
    parser.add_argument("--judge", help="a separate language model, for perplexity")
    parser.add_argument("--scorer", default="bundled", help="of toxicity (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder of the full report and the continuations")
    args = parser.parse_args()
    torch.set_num_threads(1)

    target = _language_model(args.target)
    texts = load_texts(args.text, seed=args.seed) if args.text else None
    evaluation = evaluate(
        target,
        [method for alpha in args.alpha for method in _methods(alpha, args.calibrator, target)],
        load_prompts(args.prompts, count=args.prompt_count, seed=args.seed),
        load_scorer(args.scorer),
        args.output,
        sampling=SamplingConfig(samples=args.samples, top_p=args.top_p, seed=args.seed),
        judge=_language_model(args.judge) if args.judge else None,
        benign_texts=texts,
        resume=Path(args.output).exists(),
        show_progress=True,
    )
    write_report(evaluation, args.output)
    rows = [
        (result, mean_entropy(target, result.method, texts or [prompt.text for prompt in evaluation.prompts]))
        for result in evaluation.results
    ]
    _print_table(rows)


def _language_model(name: str | None) -> LanguageModel:
    loaded = load_target(name)
    return LanguageModel(loaded.name, loaded.model, loaded.tokenizer)


def _methods(alpha: float, calibrator: str | None, target: LanguageModel) -> list[Method]:
    """The control and both fusions of one strength."""
    control = Method(
        key=f"temperature-{alpha:g}",
        title=f"{TEMPERATURE}, alpha {alpha:g}",
        make_processors=lambda: [TemperatureOnly(alpha)],
        family=TEMPERATURE,
        alpha=alpha,
        settings={"alpha": alpha},
    )
    methods = [control]
    for family, hidden_temperature in ((PUBLISHED, True), (WEIGHT_ONE, False)):
        fusion = CalibFusion.from_pretrained(
            calibrator,
            tokenizer=target.tokenizer,
            target=target.model,
            mode="embedding",
            alpha=alpha,
            hidden_temperature=hidden_temperature,
        )
        methods.append(
            Method(
                key=f"{family.replace(' ', '-')}-{alpha:g}",
                title=f"{family}, alpha {alpha:g}",
                make_processors=lambda fusion=fusion: [fusion],
                family=family,
                alpha=alpha,
                settings=fusion.config.to_dict(),
            )
        )
    return methods


@torch.no_grad()
def mean_entropy(target: LanguageModel, method: Method, texts: Sequence[str]) -> float:
    """Mean entropy of a method's next-token distribution over the positions of texts, in nats."""
    total, positions = 0.0, 0
    for text in texts:
        ids = target.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"]
        if ids.shape[1]:
            log_probs = method_log_probs(method.make_processors(), ids, target.model(ids).logits)
            total -= float((log_probs.exp() * log_probs).sum())
            positions += ids.shape[1]
    return total / max(1, positions)


def _print_table(rows: Sequence[tuple[MethodResult, float]]) -> None:
    metrics = [name for name in ("perplexity", "target_perplexity") if name in rows[0][0].estimates]
    print(f"| method | entropy | KL from target | toxic | mean toxicity | {' | '.join(metrics)} |")
    print("|---" * (5 + len(metrics)) + "|")
    for result, entropy in rows:
        figures = result.estimates
        toxic, mean = figures["toxic_share"], figures["mean_toxicity"]
        cells = [
            result.method.title,
            f"{entropy:.3f}",
            f"{result.neutrality.divergence:.4f}" if result.neutrality else "0",
            f"{100 * toxic.value:.2f} % ({100 * toxic.low:.2f} to {100 * toxic.high:.2f})",
            f"{mean.value:.4f}",
            *(f"{figures[name].value:.1f}" for name in metrics),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
