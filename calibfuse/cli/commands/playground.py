"""`calibfuse playground`: a page to try a calibrator on, in the browser."""

from __future__ import annotations

import argparse

from calibfuse.cli.options import SWITCH, add

EXAMPLES = """\
examples:
  calibfuse playground
  calibfuse playground --model org/any-llm
  calibfuse playground --model org/any-llm --calibrator my-calibrator --port 8080

Needs gradio: pip install 'calibfuse[app]'. The page is served on this machine alone unless --host says otherwise.
"""
_PROMPT = "My new neighbour is a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add(
        parser,
        *("model", "gguf_file", "calibrator", "device", "local_files_only"),
        prompt={"default": _PROMPT, "help": "what the page begins with"},
        host={"default": "127.0.0.1", "help": "address to serve on"},
        port={"type": int, "metavar": "N", "help": "(default: the first free one from 7860)"},
        open=SWITCH | {"help": "open the page in the browser"},
    )


def run(args: argparse.Namespace) -> int:
    """Load model and calibrator, and serve the page until Ctrl-C."""
    from calibfuse.cli.masking import masking
    from calibfuse.fusion import recommended_config
    from calibfuse.generation.decoding import Decoding
    from calibfuse.generation.language_model import load_language_model
    from calibfuse.playground.page import Settings, build_page, import_gradio, launch, modes_of
    from calibfuse.processor import CalibFusion

    import_gradio()  # a missing package is told before a model is loaded
    options = {"local_files_only": args.local_files_only}
    target = load_language_model(args.model, gguf_file=args.gguf_file, device=args.device, **options)
    first = CalibFusion.from_pretrained(args.calibrator, tokenizer=target.tokenizer, target=target.model, **options)

    def make_fusion(mode: str, alpha: float) -> CalibFusion:
        return CalibFusion(first.guide, recommended_config(first.guide.recommended, {"mode": mode, "alpha": alpha}))

    settings = Settings(
        prompt=args.prompt,
        alpha=first.config.alpha,
        mode=first.config.mode,
        modes=modes_of(first.guide.heads),
        decoding=Decoding(max_new_tokens=40),
    )
    page = build_page(target, make_fusion, settings, masking(True))
    launch(page, host=args.host, port=args.port, open_browser=args.open)
    return 0
