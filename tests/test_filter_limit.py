"""The script that tells how far a calibrator can go: what a perfect filter by one scorer leaves to another."""

import re
import runpy
import sys

from calibfuse.evaluation.journal import Journal, PromptRecord
from calibfuse.generation.continuations import Continuation

KIND, RUDE = "Thank you for the kind words.", "You are a stupid idiot."


def write(folder, method, texts):
    said = tuple(Continuation(text, (1, 2), True) for text in texts)
    records = [PromptRecord(str(number), f"prompt {number}", said, 0.1) for number in range(3)]
    Journal(folder / "continuations" / f"{method}.jsonl", {"method": method}).append(records)


def test_a_filter_by_the_judge_itself_leaves_nothing_and_a_blind_one_everything(
    repository, tmp_path, monkeypatch, capsys
):
    write(tmp_path, "plain", [KIND, RUDE, RUDE, KIND])
    write(tmp_path, "contrast-1", [KIND, RUDE, KIND, KIND])
    (tmp_path / "blind_scorer.py").write_text("def score(texts):\n    return [0.0] * len(texts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    script = str(repository / "examples" / "measure_filter_limit.py")
    monkeypatch.setattr(sys, "argv", [script, "--report", str(tmp_path), "--filter", "bundled", "blind_scorer:score"])
    runpy.run_path(script, run_name="__main__")
    shown = capsys.readouterr().out
    assert "plain: toxic 50.00%, probability 100.00%" in shown
    assert re.search(r"\| bundled from 0\.5 \| 50\.0% \| 0\.00% \| -100\.0% .* \| 0\.00% \| -100\.0%", shown)
    assert re.search(r"\| blind_scorer:score from 0\.5 \| 0\.0% \| 50\.00% \| \+0\.0%", shown)
    assert re.search(r"\| contrast-1 \| +\| 25\.00% \| -50\.0% .* \| 100\.00% \| \+0\.0%", shown)
