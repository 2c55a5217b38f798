"""`calibfuse playground`: a page to try a calibrator on, in the browser."""

from __future__ import annotations

import argparse

from calibfuse.cli.loading import load_model
from calibfuse.cli.options import add, add_model

EXAMPLES = """\
examples:
  calibfuse playground
  calibfuse playground --model org/any-llm
  calibfuse playground --model org/any-llm --calibrator my-calibrator --port 8080

Needs gradio: pip install 'calibfuse[app]'. The page is served on this machine alone unless --host says otherwise.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    host = {"default": "127.0.0.1", "help": "address to serve on"}
    port = {"type": int, "metavar": "N", "help": "(default: the first free one from 7860)"}
    add_model(parser)
    add(parser, "calibrator", host=host, port=port)


def run(args: argparse.Namespace) -> int:
    """Load model and calibrator, and serve the page until Ctrl-C."""
    from calibfuse.cli.terminal import masking
    from calibfuse.playground.page import CSS, build_page, import_gradio
    from calibfuse.processor import CalibFusion

    import_gradio()  # a missing package is told before a model is loaded
    target = load_model(args, args.model)
    fusion = CalibFusion.from_pretrained(args.calibrator, tokenizer=target.tokenizer, target=target.model)
    page = build_page(target, fusion, masking(True))
    page.launch(server_name=args.host, server_port=args.port, share=False, css=CSS)
    return 0
