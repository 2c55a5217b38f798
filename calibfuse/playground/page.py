"""The page itself, in gradio (extra `app`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from math import exp
from typing import Any

from calibfuse.account import TOUCHED_FROM, Report
from calibfuse.errors import InputError, MissingDependencyError
from calibfuse.fusion import MODES, recommended_config
from calibfuse.generation.decoding import Decoding
from calibfuse.generation.language_model import LanguageModel
from calibfuse.html import Mask
from calibfuse.inspection.spelling import mask_pieces
from calibfuse.inspection.trace import StepTrace
from calibfuse.playground.streaming import stream_both
from calibfuse.processor import CalibFusion

Shown = tuple[str, tuple[StepTrace, ...]]  # the plain continuation, and the steps of the guided one

_PROMPT = "My new neighbour is a"
_HIGHEST_STRENGTH = 5.0
_COLOURED_FROM = 0.05  # nats: tokens that moved less are left plain
_NAMED = 5  # tokens of the account
_HEADERS = ["token", "plain", "guided", "shift"]
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto; }
#plain, #guided { min-height: 9rem; }
#plain .token, #guided .token { padding: 0; margin: 0; }
#plain .token-container, #guided .token-container { font-size: 0; }  /* blanks of the markup between tokens */
#plain .text, #guided .text { font-size: 1rem; white-space: pre-wrap; }
#candidates table { font-size: 0.85rem; }
#candidates { overflow-x: auto; }
#candidates th, #candidates td { min-width: 0 !important; padding: 0.2rem 0.3rem !important; }
"""


def build_page(target: LanguageModel, first: CalibFusion, mask: Mask) -> Any:  # noqa: ANN401
    """The page as gradio Blocks."""
    gr = import_gradio()
    has_chat = bool(target.tokenizer.chat_template)

    def run(
        prompt: str, alpha: float, mode: str, tokens: float, top_p: float, seed: float, chat: bool, masked: bool
    ) -> Iterator[tuple[Any, ...]]:
        decoding = Decoding(max_new_tokens=int(tokens), top_p=top_p, seed=int(seed), chat=chat)
        options = {"mode": mode, "alpha": alpha}
        try:
            if not prompt.strip():
                raise InputError("Type a prompt first.")
            fusion = CalibFusion(first.guide, recommended_config(first.guide.recommended, options))
            for progress in stream_both(target, fusion, prompt, decoding):
                yield (*_shown(progress.plain, progress.steps, _mask(masked)), (progress.plain, progress.steps))
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show_again(state: Shown | None, masked: bool) -> tuple[Any, ...]:
        return _shown(*(state or ("", ())), _mask(masked))

    def show_candidates(state: Shown | None, masked: bool, event: Any) -> Any:  # noqa: ANN401
        step = (state or ("", ()))[1][int(event.index)]
        return gr.Dataframe(candidate_rows(step, _mask(masked)), headers=_HEADERS, visible=True)

    def _mask(masked: bool) -> Mask:
        return mask if masked else str

    # gradio finds the event's parameter by its type, and annotations are strings in this module
    show_candidates.__annotations__["event"] = gr.SelectData

    with gr.Blocks(title="calibfuse playground") as page:
        gr.Markdown(f"# calibfuse\n{target.name}: plain and guided, with the same seed")
        prompt = gr.Textbox(_PROMPT, label="Prompt", lines=2, elem_id="prompt")
        with gr.Row():
            strength = first.config.alpha
            alpha = gr.Slider(
                0.0, _HIGHEST_STRENGTH, strength, step=0.05, label="Strength (0: off)", elem_id="strength"
            )
            heads = set(first.guide.heads)  # embedding needs the target's output head as well
            modes = [name for name, each in MODES.items() if each.fuse is not None and set(each.heads) <= heads]
            mode = gr.Dropdown(modes, value=first.config.mode, label="Mode")
        with gr.Accordion("More settings", open=False), gr.Row():
            tokens = gr.Slider(1, 200, 40, step=1, label="New tokens")
            top_p = gr.Slider(0.05, 1.0, 0.9, step=0.05, label="Top-p")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            chat = gr.Checkbox(has_chat, label="Chat template", visible=has_chat)
        with gr.Row():
            go = gr.Button("Continue", variant="primary", elem_id="go")
            stop = gr.Button("Stop")
            masked = gr.Checkbox(True, label="Mask offensive words", elem_id="masked")
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("### Plain")
                plain = gr.HighlightedText([], show_label=False, elem_id="plain", show_legend=False)
            with gr.Column(min_width=300):
                gr.Markdown("### Guided")
                guided = gr.HighlightedText([], show_label=False, elem_id="guided", show_legend=False)
        gr.Markdown("Coloured tokens were made likelier or less likely; click a token to see its rivals.")
        told = gr.Markdown(elem_id="account")
        candidates = gr.Dataframe(
            headers=_HEADERS, interactive=False, visible=False, label="Candidates (shift in nats)", elem_id="candidates"
        )
        state = gr.State(None)
        shown = [plain, guided, told]
        inputs = [prompt, alpha, mode, tokens, top_p, seed, chat, masked]
        running = gr.on([go.click, prompt.submit], run, inputs, [*shown, state], concurrency_limit=1)
        stop.click(None, cancels=[running])
        masked.change(show_again, [state, masked], shown)
        guided.select(show_candidates, [state, masked], candidates)
    return page


def import_gradio() -> Any:  # noqa: ANN401
    """The package gradio, with its telemetry off."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError("The playground needs gradio: pip install 'calibfuse[app]'.") from error
    return gradio


def _shown(plain: str, steps: tuple[StepTrace, ...], mask: Mask) -> tuple[Any, Any, str]:
    pieces = mask_pieces([step.text for step in steps], mask)
    return (
        [(mask(plain), None)],
        [(piece or " ", _colour(step)) for piece, step in zip(pieces, steps, strict=True)],
        account(steps, mask),
    )


def _colour(step: StepTrace) -> float | None:
    """In [-1, 1]: how far the token was moved, 1 for a nat and more; None: hardly at all."""
    shift = step.chosen.shift
    return None if abs(shift) < _COLOURED_FROM else max(-1.0, min(1.0, shift))


def account(steps: Sequence[StepTrace], mask: Mask) -> str:
    """What the fusion did to a continuation, in a few figures."""
    if not steps:
        return ""
    lowered: Counter[str] = Counter()
    for step in steps:
        for each in step.candidates:
            lowered[each.text.strip()] += max(0.0, exp(each.plain) - exp(each.fused))  # type: ignore[assignment]
    named = tuple((mask(text), lost) for text, lost in lowered.most_common(_NAMED) if text and lost)
    touched = sum(step.moved_mass >= TOUCHED_FROM for step in steps)
    moved = sum(step.moved_mass for step in steps) / len(steps)
    return str(Report(len(steps), touched, moved, left_alone=0, lowered=named))


def candidate_rows(step: StepTrace, mask: Mask) -> list[list[str]]:
    """Rows of a table: token, probability before and after, shift in nats."""
    return [
        [
            mask(each.text),
            *(f"{100 * exp(value):.2f} %" for value in (each.plain, each.fused)),
            f"{each.shift:+.2f}" if each.is_movable else "-",
        ]
        for each in step.candidates
    ]
