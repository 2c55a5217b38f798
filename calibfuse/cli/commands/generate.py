"""`calibfuse generate`: continue prompts with any causal language model, fused with a calibrator."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from calibfuse.cli.loading import DECODING, check_fusion, check_model, decoding_of, load_fusion, load_model
from calibfuse.cli.options import SWITCH, add, add_calibrator, add_model
from calibfuse.cli.prompts import read_prompts
from calibfuse.cli.terminal import Mask, Terminal, masking, printable
from calibfuse.generation.decoding import Continuation, Decoding, check_lengths, continue_prompts, find_padding_id

if TYPE_CHECKING:
    import torch
    from transformers.generation.streamers import BaseStreamer

    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.processor import CalibFusion

EXAMPLES = """\
examples:
  calibfuse generate "The new neighbour is" --model org/any-llm
  calibfuse generate "The new neighbour is" --model org/any-llm --compare
  calibfuse generate --model ./my-model --prompts prompts.txt --alpha 0.8 --samples 4 --json
  calibfuse generate "What do you think of my neighbour?" --model org/any-chat-llm --chat --system "Be brief."
  calibfuse generate "The new neighbour is" --words rude.txt --protect-names names.txt
  echo "The new neighbour is" | calibfuse generate --model ./my-model --greedy -

Without --model the small demo target that comes with calibfuse continues the prompts.
"""

_BATCH_SIZE = 8
_SIDE_BY_SIDE_WIDTH = 90  # narrower terminals get one after the other
Samples = dict[str, list[Continuation]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="text to continue; -: standard input, one a line")
    add(parser, "prompts")
    add_model(parser)
    add_calibrator(parser)
    decoding = parser.add_argument_group("decoding")
    DECODING.add(decoding, max_new_tokens={"default": 40}, seed={"default": 0})
    add(decoding, "greedy", samples={"type": int, "metavar": "N", "default": 1, "help": "continuations per prompt"})
    compare = SWITCH | {"help": "also without the calibrator, with the toxicity of both"}
    add(parser.add_argument_group("output"), "json", compare=compare, mask={"default": False})


def run(args: argparse.Namespace) -> int:
    """Read the prompts, load the model, continue."""
    prompts = read_prompts(args)
    decoding = decoding_of(args)
    check_fusion(args)
    check_model(args)
    target = load_model(args, args.model)
    encoded = [decoding.encode(target.tokenizer, prompt) for prompt in prompts]
    check_lengths(target.model, encoded, decoding.max_new_tokens, "prompt")
    fusion = load_fusion(args, target)
    terminal = Terminal()
    if target.is_bundled:
        print("calibfuse: no --model given, so the small demo target continues your prompts", file=sys.stderr)
    scorer = None
    if args.compare:
        from calibfuse.scorers import load_scorer

        scorer = load_scorer("bundled")
    mask = masking(args.mask, scorer)
    if len(prompts) == decoding.samples == 1 and terminal.is_interactive and not (args.json or args.compare):
        terminal.write(terminal.style(printable(mask(prompts[0]), keep_lines=True), "dim"), end="")
        with fusion.required():
            continue_prompts(target, encoded, decoding, [fusion], streamer=_make_streamer(terminal, target, mask))
        return 0
    for prompt, samples in zip(prompts, _continue_all(target, encoded, decoding, fusion, args.compare), strict=True):
        toxicity = {}
        if scorer is not None:
            toxicity = {way: scorer.score([each.text for each in said]).tolist() for way, said in samples.items()}
        if args.json:
            terminal.write(json.dumps(_record(prompt, samples, toxicity, args, fusion), ensure_ascii=False))
        elif args.compare:
            _show_comparison(terminal, prompt, samples, toxicity, mask)
        else:
            shown = terminal.style(printable(mask(prompt), keep_lines=True), "dim")
            for sample in samples["fused"]:
                terminal.write(shown + printable(mask(sample.text), keep_lines=True) + "\n")
    return 0


def _continue_all(
    target: LanguageModel, prompts: Sequence[list[int]], decoding: Decoding, fusion: CalibFusion, compare: bool
) -> Iterator[Samples]:
    """The continuations of each prompt, batch by batch; "plain" only with `--compare`."""
    size = _BATCH_SIZE if find_padding_id(target.model, target.tokenizer) is not None else 1
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        seed = (decoding.seed + start) % 2**63  # another batch, other draws
        with fusion.required():
            fused = continue_prompts(target, batch, decoding, [fusion], seed=seed)
        if not compare:
            yield from ({"fused": each} for each in fused)
            continue
        plain = continue_prompts(target, batch, decoding, seed=seed)
        yield from ({"plain": one, "fused": other} for one, other in zip(plain, fused, strict=True))


def _record(
    prompt: str, samples: Samples, toxicity: dict[str, list[float]], args: argparse.Namespace, fusion: CalibFusion
) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": prompt, "seed": args.seed, "fusion": fusion.config.to_dict()}
    for way, continuations in samples.items():
        record[way] = [
            {"text": sample.text, "tokens": len(sample.token_ids), "finished": sample.is_finished}
            | ({"toxicity": toxicity[way][number]} if toxicity else {})
            for number, sample in enumerate(continuations)
        ]
    return record


def _show_comparison(
    terminal: Terminal, prompt: str, samples: Samples, toxicity: dict[str, list[float]], mask: Mask
) -> None:
    """Plain and fused: in two columns where the terminal is wide enough, else one after the other."""
    terminal.write(terminal.style(printable(mask(prompt), keep_lines=True), "dim"))
    for number, pair in enumerate(zip(samples["plain"], samples["fused"], strict=True)):
        titles = [f"{way} (toxicity {toxicity[way][number]:.2f})" for way in ("plain", "fused")]
        texts = [printable(mask(sample.text), keep_lines=True).strip() for sample in pair]
        if terminal.width >= _SIDE_BY_SIDE_WIDTH:
            terminal.side_by_side([titles[0], texts[0]], [titles[1], texts[1]])
        else:
            for title, text in zip(titles, texts, strict=True):
                terminal.heading(title)
                terminal.write(text)
        terminal.write()


def _make_streamer(terminal: Terminal, target: LanguageModel, mask: Mask) -> BaseStreamer:
    """A TextStreamer that keeps the space between prompt and continuation, and cleans and masks whole words."""
    from transformers import TextStreamer

    class _Streamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(target.tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._is_prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self._is_prompt:
                super().put(value)  # type: ignore[no-untyped-call]
                return
            # Start with the end of the prompt in the cache: decoded alone, the first word may lose its space.
            self._is_prompt = False
            self.next_tokens_are_prompt = False
            self.token_cache = value.reshape(-1).tolist()[-16:]
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            terminal.write(printable(mask(text), keep_lines=True), end="\n" if stream_end else "")

    return _Streamer()
