"""Every program in tools/ loads with the package as it is, says what it does, and stands in the README beside it."""

import base64
import importlib.util
import io
import json
import lzma
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from tiny_calibrators import make_calibrator

from calibfuse.calibrator import Calibrator
from calibfuse.errors import InputError
from calibfuse.evaluation import HolisticBias
from calibfuse.scorers.adapters import FunctionScorer
from calibfuse.vocabulary import Vocabulary

PROGRAMS = sorted((REPOSITORY / "tools").glob("*.py"))


def load(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_tool_shows_its_help(path, monkeypatch, capsys):
    module = load(path, monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_the_readme_lists_every_tool():
    text = (REPOSITORY / "tools" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in PROGRAMS if f"`{path.name}`" not in text] == []


@pytest.fixture
def text_encoder(monkeypatch):
    return load(REPOSITORY / "tools" / "library" / "text_encoder.py", monkeypatch).text_encoder


def test_text_is_cut_with_a_word_piece_list_as_with_the_whole_tokenizer(
    tmp_path, sample_lines, wordpiece_tokenizer, text_encoder
):
    words = sorted(wordpiece_tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in words), encoding="utf-8")
    wordpiece_tokenizer.save(str(tmp_path / "tokenizer.json"))
    listed, whole = (text_encoder(tmp_path / name)(sample_lines) for name in ("vocab.txt", "tokenizer.json"))
    assert listed == whole


def test_text_is_cut_with_a_sentencepiece_model(tmp_path, sample_lines, text_encoder):
    library = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_lines), model_writer=made, vocab_size=400, byte_fallback=True, minloglevel=2
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(made.getvalue())
    vocabulary = Vocabulary.from_tokenizer(str(path))
    for line, ids in zip(sample_lines, text_encoder(path)(sample_lines), strict=True):
        assert not vocabulary.is_special[ids].any()
        assert sum(len(vocabulary.token_bytes(each)) for each in ids) >= len(line.encode())


def test_a_tokenizer_that_cannot_cut_text_is_told_so(tmp_path, text_encoder):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    with pytest.raises(InputError, match="does not say how a text is cut"):
        text_encoder(path)


class TestTrainingOfTheValueHead:
    @pytest.fixture
    def module(self, monkeypatch):
        module = load(REPOSITORY / "tools" / "train_value_head.py", monkeypatch)
        counts = {symbol: (label, 5) for symbol, (label, _) in module.SENTENCES.items()}
        monkeypatch.setattr(module, "SENTENCES", counts)
        teacher = FunctionScorer(lambda texts: [0.95 if "vile" in text else 0.05 for text in texts], name="teacher")
        monkeypatch.setattr(module, "load_scorer", {"teacher": teacher}.__getitem__)
        return module

    @pytest.fixture
    def options(self, module, tmp_path, byte_level_tokenizer):
        """The arguments of a run on a calibrator of 20,000 weights and texts whose second word tells the label."""
        texts = [
            (f"They are {'vile' if label else 'fine'} in town {number}.", label)
            for number in range(40)
            for label in (0, 1)
        ]
        labelled = [
            {"text": text, "label": label, "split": "train" if number % 5 else "test"}
            for number, (text, label) in enumerate(texts)
        ]
        files = {each.path: labelled for each in module.SETS}
        files["context/measuring_hate_speech"] = [{"text": "Kept for a scorer.", "label": 1, "split": "train"}]
        files["toxicity/jigsaw"] = [{"text": "Kept for a judge.", "toxic": 1, "split": "jigsaw_train"}]
        files["toxicity/paradetox"] = [{"toxic": "What a vile day.", "neutral": ["What a fine day."]}]
        files |= {path: [{"text": "A calm evening by the sea. " * 9, "source": ""}] for path in module.TEXTS}
        for name, rows in files.items():
            path = tmp_path / f"{name}.jsonl.xz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        names = tmp_path / "bias" / "holistic_bias"
        names.mkdir(parents=True)
        for name, content in (
            ("descriptors", {"ability": {"auditory": ["Deaf"]}}),
            ("sentence_templates", {"I'm {noun_phrase}.": {}, "I like {plural_noun_phrase}.": {}}),
            ("standalone_noun_phrases", {"religion": [{"noun_phrase": "a Jain", "plural_noun_phrase": "Jains"}]}),
        ):
            (names / f"{name}.json").write_text(json.dumps(content))
        byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
        make_calibrator().save_pretrained(tmp_path / "base")
        return [
            *("--data", str(tmp_path), "--tokenizers", str(tmp_path / "tokenizer.json")),
            *(
                "--calibrator",
                str(tmp_path / "base"),
                "--steps",
                "20",
                "--learning-rate",
                "0.05",
                "--teacher",
                "teacher",
            ),
        ]

    def test_the_loss_falls_and_the_other_heads_say_what_they_said(
        self, module, options, tmp_path, byte_level_tokenizer
    ):
        assert module.main([*options, "--output", str(tmp_path / "new")]) == 0
        state = json.loads((tmp_path / "new" / "work" / "checkpoint" / "state.json").read_text())
        losses = [row["loss"] for row in state["history"]]
        assert len(losses) == 20
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
        base, new = Calibrator.from_pretrained(tmp_path / "base"), Calibrator.from_pretrained(tmp_path / "new")
        assert new.config.words == {**base.config.words, "jains": 0.3}
        assert new.config.training["value_head"].keys() >= {"data", "licences", "steps"}
        ids = torch.tensor([byte_level_tokenizer.encode("They are fine in town 7.").ids])
        said = {}
        for calibrator in (base, new):
            calibrator.config = replace(calibrator.config, words=base.config.words)
            bound = calibrator.bind(byte_level_tokenizer, use_disk_cache=False)
            said[calibrator] = bound.read_sequence(ids, None)
        for head in base.config.heads:
            assert torch.equal(said[new].log_scores(head), said[base].log_scores(head))
        value = said[new].log_scores("value")
        assert value.max() < 0.0
        assert value.std() > 0.0

    def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(self, module, options, tmp_path, monkeypatch):
        assert module.main([*options, "--output", str(tmp_path / "whole")]) == 0
        stopped = [*options, "--output", str(tmp_path / "stopped")]
        with monkeypatch.context() as patch:
            patch.setattr(module.ValueTraining, "agree", lambda training, told: training.step == 7)
            assert module.main(stopped) == 130
        with pytest.raises(SystemExit):
            module.main(stopped)  # without --resume
        assert module.main([*stopped, "--resume"]) == 0
        whole, resumed = (Calibrator.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped"))
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    def test_texts_for_measuring_stay_out_of_all_sets(self, module, options, tmp_path):
        found = {text for text, _ in module.labelled_examples(tmp_path, module.random.Random(0))}
        assert "They are fine in town 0." not in found  # of the test split
        assert not {"Kept for a judge.", "Kept for a scorer."} & found
        assert "What a fine day." in found

    def test_the_teacher_is_asked_halfway_where_there_is_a_label_and_alone_where_there_is_none(self, module):
        examples = [("A vile day.", 1.0), ("A vile word, quoted.", 0.0), ("A vile sentence.", None)]
        found = module.taught(examples, 2, module.load_scorer("teacher"))
        assert [round(target, 3) for _, target in found] == [0.962, 0.578, 0.95]

    def test_swearing_keeps_more_than_the_head_can_excuse(self, module):
        table = {"fuck": -6.0, "fuc": -4.2, "idiot": -6.0, "kill": -1.7, "jain": 0.3}
        sorted_by_kind = {"fuck": -8.0, "fuc": -5.6, "idiot": -4.0, "kill": -1.7, "jain": 0.3}
        assert module.by_kind(table) == sorted_by_kind
        config = make_calibrator().config
        nobody = HolisticBias((), (), ())
        assert module.word_table(replace(config, words=table), nobody) == sorted_by_kind
        # a table that was sorted for an earlier head stays as it is
        again = replace(config, words=sorted_by_kind, heads=(*config.heads, "value"))
        assert module.word_table(again, nobody) == sorted_by_kind
