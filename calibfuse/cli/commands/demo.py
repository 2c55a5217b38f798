"""`calibfuse demo`: a language model continues a few prompts with and without the calibrator, side by side.

Everything it needs comes with the package; figures and draws are those of `calibfuse evaluate`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibfuse.cli.loading import check_model, load_model
from calibfuse.cli.options import Fields, add, add_model
from calibfuse.cli.prompts import bundled_prompts
from calibfuse.cli.terminal import Mask, Terminal, masking, printable
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.evaluation import Evaluation
    from calibfuse.evaluation.sampling import PromptRecord
    from calibfuse.scorers import ToxicityScorer

EXAMPLES = """\
examples:
  calibfuse demo
  calibfuse demo --model org/any-llm --prompt-count 10
  calibfuse demo --prompt-count 5 --samples 4 --no-mask

The bundled models are tiny, so that this takes less than a minute. `calibfuse evaluate --model org/any-llm` measures
your own model, with intervals; `calibfuse generate "a prompt"` continues your own prompts.
"""

SAMPLING = Fields("calibfuse.evaluation.sampling:SamplingConfig", "samples", "max_new_tokens", "seed")
_WAYS = (("plain", "without calibrator"), ("fused", "with calibrator"))
_FIGURES = ("toxic_share", "mean_toxicity", "expected_maximum_toxicity", "toxicity_probability", "target_perplexity")
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add(parser, "alpha", "mask", prompt_count={"default": 30, "help": "of the bundled ones"})
    SAMPLING.add(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Load, continue, show."""
    started = time.monotonic()
    from calibfuse.fusion import FusionConfig

    FusionConfig.from_dict({} if args.alpha is None else {"alpha": args.alpha})
    prompts = bundled_prompts()
    if not 1 <= args.prompt_count <= len(prompts):
        raise InputError(f"--prompt-count must lie in 1..{len(prompts)}, the bundled prompts; got {args.prompt_count}.")
    check_model(args)
    import torch

    from calibfuse.evaluation import Method, Prompt, SamplingConfig, evaluate
    from calibfuse.processor import CalibFusion
    from calibfuse.scorers import load_scorer

    sampling = SamplingConfig(**SAMPLING.values(args))
    if args.model is None:
        torch.set_num_threads(1)  # such small models gain nothing from a second thread, and lose on a busy machine
    scorer = load_scorer("bundled")
    target = load_model(args, args.model)
    fusion = CalibFusion.from_pretrained(tokenizer=target.tokenizer, alpha=args.alpha, device=target.model.device)
    with tempfile.TemporaryDirectory(prefix="calibfuse-demo-") as folder:
        evaluation = evaluate(
            target,
            [Method("fused", "with calibrator", lambda: [fusion])],
            [Prompt(f"demo {number}", text) for number, text in enumerate(prompts[: args.prompt_count], start=1)],
            scorer,
            folder,
            sampling=sampling,
            benign_texts=[],
            show_progress=sys.stderr.isatty(),
        )
        said = [_read(Path(folder) / "continuations" / f"{key}.jsonl") for key, _ in _WAYS]
    pairs = _most_different(said[0], said[1], scorer)
    terminal = Terminal()
    _show_pairs(terminal, pairs, masking(args.mask, scorer))
    _show_table(terminal, evaluation)
    terminal.write()
    terminal.note(
        f"{args.prompt_count} prompts x {sampling.samples} continuations of at most {sampling.max_new_tokens} tokens, "
        f"top-p {sampling.top_p:g}, seed {sampling.seed}; mode {fusion.config.mode}, alpha {fusion.config.alpha:g}; "
        f"scorer {scorer.name!r}; target of {target.model.num_parameters() / 1e6:.1f} M parameters; "
        f"{time.monotonic() - started:.0f} s in all. Another seed gives other numbers: `calibfuse evaluate` gives "
        "intervals; `calibfuse generate --compare` shows your own prompts."
    )
    return 0


def _read(journal: Path) -> list[PromptRecord]:
    from calibfuse.evaluation.sampling import PromptRecord

    lines = journal.read_text(encoding="utf-8").split("\n")[1:-1]
    return sorted(map(PromptRecord.from_line, lines), key=lambda record: record.prompt_id)


def _most_different(
    plain_records: Sequence[PromptRecord], fused_records: Sequence[PromptRecord], scorer: ToxicityScorer
) -> list[tuple[str, list[tuple[float, str]]]]:
    """Prompts and, of both ways, toxicity and text of the continuation where these differ most in toxicity."""
    found = []
    for plain, fused in zip(plain_records, fused_records, strict=True):
        texts = [[each.text for each in record.continuations] for record in (plain, fused)]
        scores = [scorer.score(each) for each in texts]
        distances = abs(scores[0] - scores[1])
        place = int(distances.argmax())
        pair = [(float(score[place]), text[place]) for score, text in zip(scores, texts, strict=True)]
        found.append((float(distances[place]), plain.prompt, pair))
    found.sort(key=lambda each: each[0], reverse=True)
    return [(prompt, pair) for _, prompt, pair in found[:_SHOWN]]


def _show_pairs(terminal: Terminal, pairs: Sequence[tuple[str, list[tuple[float, str]]]], mask: Mask) -> None:
    def shown(text: str) -> str:
        return printable(mask(text)).strip()

    terminal.heading(f"The {len(pairs)} prompts whose toxicity differs most (same prompt, same random draws)")
    for prompt, pair in pairs:
        terminal.write("\n" + terminal.style(shown(prompt) + " ...", "cyan"))
        ways = zip(_WAYS, pair, strict=True)
        terminal.side_by_side(*([f"{name}, toxicity {score:.2f}", shown(text)] for (_, name), (score, text) in ways))
    terminal.write()


def _show_table(terminal: Terminal, evaluation: Evaluation) -> None:
    from calibfuse.evaluation import METRICS
    from calibfuse.evaluation.report.tables import change, figure

    plain, fused = evaluation.results
    rows = [
        (
            METRICS[name].title,
            *(figure(name, each.estimates[name].value) for each in (plain, fused)),
            change(fused.changes.get(name)),
        )
        for name in _FIGURES
    ]
    if plain.speed is not None and fused.speed is not None:
        before, after = (f"{each.tokens_per_second:,.0f}" for each in (plain.speed, fused.speed))
        rows.append(("tokens per second", before, after, f"{100 * (fused.speed.kept - 1):+.1f} %"))
    terminal.table(("", "without", "with", "change"), rows)
