"""README.md and docs/ say what is true: their code runs, their commands exist, their links lead somewhere.

`markdown_blocks.py` tells the convention for writers.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_blocks import calibfuse_commands, read_blocks

from calibfuse.cli import main as cli

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in read_blocks(page)]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


@every_block
def test_a_skipped_block_says_why(block):
    assert block.skip is None or len(block.skip) > 5, f"{block}: write <!-- skip: the reason -->"


@every_block
def test_code_is_valid_whether_it_is_run_or_not(block):
    if block.language == "python":
        compile(block.code, str(block), "exec")
    else:
        subprocess.run(["bash", "-n", "-c", block.code], check=True)
        for command in calibfuse_commands(block.code):
            if "--help" not in command:
                try:
                    cli.build_parser(command[0] if command else None).parse_args(command)
                except SystemExit:
                    pytest.fail(f"{block}: the command line refuses {command}")


@every_page
def test_links_to_files_of_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text)
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["README.md", "docs/index.md", "docs/quickstart.md", "docs/pitfalls.md", "docs/reference.md"]
)
def test_the_first_program_of_a_page_runs_as_it_is_pasted(name, tmp_path, monkeypatch):
    """Without what the page hides from its readers."""
    blocks = read_blocks(REPOSITORY / name)
    code = next(block.code for block in blocks if block.language == "python" and not block.hidden)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


def calls(code):
    """The arguments of a block that holds nothing but calls of `calibfuse`, which need no process each."""
    lines = [line.partition("  #")[0] for line in code.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    commands = [shlex.split(line) for line in lines if line.strip()]
    is_plain = not re.search(r"[|<>&;$]", code) and all(command[0] == "calibfuse" for command in commands)
    return [command[1:] for command in commands] if is_plain else None


@pytest.mark.slow
@every_page
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All of a page in order: later blocks may use what earlier ones made."""
    blocks = [block for block in read_blocks(page) if block.skip is None]
    if not blocks:
        pytest.skip("nothing to run on this page")
    monkeypatch.chdir(tmp_path)
    bash = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            # the line numbers of a traceback are then those of the page
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        elif (commands := calls(block.code)) is not None:
            assert [cli.main(command) for command in commands] == [0] * len(commands), f"{block}"
        else:
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.code], env=bash, capture_output=True, text=True, timeout=600
            )
            assert result.returncode == 0, f"{block}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
