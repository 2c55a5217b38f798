"""The playground: both texts as they come, the account, and the page in a real browser where one is installed."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from calibfuse.errors import InputError
from calibfuse.fusion import FusionConfig
from calibfuse.generation.decoding import Decoding, continue_prompts, encode_prompt
from calibfuse.generation.language_model import load_language_model
from calibfuse.playground.page import account, candidate_rows
from calibfuse.playground.streaming import stream_both
from calibfuse.processor import CalibFusion

PROMPT = "You are such a"
DECODING = Decoding(max_new_tokens=8, seed=3)


@pytest.fixture(scope="module")
def target():
    return load_language_model(None, device="cpu")


@pytest.fixture(scope="module")
def fusion(target):
    return CalibFusion.from_pretrained(tokenizer=target.tokenizer)


def test_both_texts_are_what_generate_gives_with_the_same_seed(target, fusion):
    last = list(stream_both(target, fusion, PROMPT, DECODING))[-1]
    ids = encode_prompt(target.tokenizer, PROMPT)
    plain = continue_prompts(target, [ids], DECODING)[0][0]
    guided = continue_prompts(target, [ids], DECODING, [fusion])[0][0]
    assert last.is_done
    assert last.plain == plain.text
    assert [step.token_id for step in last.steps] == list(guided.token_ids)


def test_progress_grows_by_single_tokens(target, fusion):
    seen = list(stream_both(target, fusion, PROMPT, DECODING))
    lengths = [len(each.steps) for each in seen]
    assert lengths[-1] == 8
    assert all(0 <= after - before <= 1 for before, after in zip(lengths, lengths[1:], strict=False))
    assert all(later.plain.startswith(earlier.plain) for earlier, later in zip(seen, seen[1:], strict=False))


def test_a_reader_that_leaves_stops_the_generation(target, fusion):
    calls = fusion.calls
    running = stream_both(target, fusion, PROMPT, Decoding(max_new_tokens=200, seed=3))
    for progress in running:
        if progress.steps:
            break
    running.close()
    assert fusion.calls - calls < 100


def test_errors_reach_the_reader(target, fusion):
    with pytest.raises(InputError, match="positions"):
        list(stream_both(target, fusion, PROMPT, Decoding(max_new_tokens=100_000)))


def test_the_account_names_what_was_lowered_masked(target, fusion):
    steps = list(stream_both(target, fusion, PROMPT, DECODING))[-1].steps
    told = account(steps, lambda text: "#" * len(text))
    assert told.startswith("8 steps, ")
    named = told.split("most lowered:")[1]
    assert "#" in named
    assert not any(letter.isalpha() for letter in named)
    untouched = list(stream_both(target, CalibFusion(fusion.guide, FusionConfig(alpha=0.0)), PROMPT, DECODING))[-1]
    assert "8 steps, 0 touched" in account(untouched.steps, str)
    assert len(candidate_rows(steps[0], str)[0]) == 4


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio", reason="needs gradio: pip install 'calibfuse[app]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "calibfuse", "playground", "--port", str(port)])
    for _ in range(120):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(1)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(address, scheme, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as run:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = run.chromium.launch(executable_path=browser_path, args=options)
        page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.fill("#prompt textarea", PROMPT)

        def continue_and_read(told):
            page.click("#go")
            page.wait_for_function(f"document.querySelector('#account')?.innerText.includes('{told}')")
            page.wait_for_timeout(500)
            join = "spans => spans.map(each => each.textContent).join('')"
            return [page.eval_on_selector_all(f"#{side} .text", join) for side in ("plain", "guided")]

        plain, guided = continue_and_read("40 steps")
        assert plain.strip()
        assert guided.strip()
        page.locator("#guided .text").nth(1).click()
        page.wait_for_selector("#candidates table")
        page.fill("#strength input[type=number]", "0")
        page.press("#strength input[type=number]", "Tab")
        again, off = continue_and_read("40 steps, 0 touched")
        assert again == plain
        assert off == plain  # strength 0 is the plain model
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == []
        browser.close()
