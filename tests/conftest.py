"""Fixtures for all tests: offline, in memory, small. One tokenizer of each family, and tiny random models.

The environment is set before anything imports torch or huggingface_hub, which read it at import time.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# One thread: the suite often shares its machine, and ratios of speed are only stable so.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test may depend on the Hub, on what this user has downloaded, or on who is logged in.
_SCRATCH = Path(tempfile.mkdtemp(prefix="calibfuse-tests-"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(_SCRATCH / "huggingface")
os.environ["XDG_CACHE_HOME"] = str(_SCRATCH / "cache")
os.environ.pop("HF_TOKEN", None)

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_TEXT = Path(__file__).with_name("sample_text.txt")


def pytest_sessionfinish() -> None:
    """Remove the scratch folder that stood in for the user's caches."""
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real text and tokenizers; the test is skipped where there is none."""
    place = Path(os.environ.get("CALIBFUSE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not place.is_dir():
        pytest.skip("no shared data: set CALIBFUSE_SHARED_DATA, or put the folder shared/data beside the repository")
    return place


@pytest.fixture(scope="session")
def sample_lines() -> list[str]:
    """About 160 lines of plain English, with a little punctuation, digits and non-ASCII text."""
    return SAMPLE_TEXT.read_text(encoding="utf-8").splitlines()


# ---- tokenizers: ids 0.. are the special tokens <s>, </s>, <pad> (WordPiece: [PAD], [UNK], [CLS], [SEP], [MASK])


@pytest.fixture(scope="session")
def byte_level_tokenizer(sample_lines: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2: 600 tokens, every byte among them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_lines, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_fallback_tokenizer(sample_lines: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece-style BPE as in Llama 2: metaspace by normalizer, <0x00> to <0xFF> for what is not covered."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, limit_alphabet=70, show_progress=False)
    trained.train_from_iterator(sample_lines, trainer)
    state = json.loads(trained.to_str())["model"]
    # The trainer cannot make ordinary (non-special) byte tokens, so the vocabulary is put together by hand.
    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(state["vocab"], key=state["vocab"].get)
    model = models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return tokenizer


@pytest.fixture(scope="session")
def unigram_tokenizer(sample_lines: list[str]) -> tokenizers.Tokenizer:
    """Unigram with metaspace and an unknown token, as in T5; no byte fallback."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sample_lines, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def wordpiece_tokenizer(sample_lines: list[str]) -> tokenizers.Tokenizer:
    """Lower-casing WordPiece as in BERT."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    tokenizer.train_from_iterator(sample_lines, trainer)
    return tokenizer


@pytest.fixture(params=["byte_level", "byte_fallback", "unigram", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    """Each family in turn."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def wrap_tokenizer() -> Callable:
    """A function: tokenizers.Tokenizer -> transformers' PreTrainedTokenizerFast, left-padding, specials by name."""
    from transformers import PreTrainedTokenizerFast

    names = {
        "bos_token": ("<s>", "[CLS]"),
        "eos_token": ("</s>", "[SEP]"),
        "pad_token": ("<pad>", "[PAD]"),
        "unk_token": ("<unk>", "[UNK]"),
    }

    def wrap(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
        specials = {
            role: name
            for role, candidates in names.items()
            for name in candidates
            if tokenizer.token_to_id(name) is not None
        }
        copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())  # the wrapper changes the object it is given
        return PreTrainedTokenizerFast(tokenizer_object=copy, padding_side="left", **specials)

    return wrap


# ---- models: random, two layers, the same weights for the same arguments


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable:
    """A function: (vocab_size, seed=0, **config) -> a random GPT-2 of 2 layers x 32 in eval mode, 256 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(vocab_size: int, seed: int = 0, **config) -> GPT2LMHeadModel:
        settings = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 1}
        settings |= {"pad_token_id": 2} | config
        return _seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **settings)), seed)

    return build


@pytest.fixture(scope="session")
def tiny_llama() -> Callable:
    """A function: (vocab_size, seed=0, **config) -> a random Llama of 2 layers x 32 in eval mode, 256 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(vocab_size: int, seed: int = 0, **config) -> LlamaForCausalLM:
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        } | config
        return _seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **settings)), seed)

    return build


def _seeded(build: Callable, seed: int):
    """Build a model from a seed without disturbing the global generator; spread its logits out.

    Random initialisation leaves logits within about 0.1 of each other, so that argmax hangs on rounding; weights ten
    times as large make the choice of a token robust to the order of a sum.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)
    return model.eval()


# ---- what stands on both: the same for a whole module


@pytest.fixture(scope="module")
def tokenizer(byte_level_tokenizer: tokenizers.Tokenizer, wrap_tokenizer: Callable):
    """The byte-level tokenizer as transformers has it."""
    return wrap_tokenizer(byte_level_tokenizer)


@pytest.fixture(scope="module")
def target(byte_level_tokenizer: tokenizers.Tokenizer, wrap_tokenizer: Callable, tiny_llama: Callable):
    """A tiny random Llama with that tokenizer, as the commands load one."""
    from calibfuse.generation.language_model import LanguageModel

    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    return LanguageModel("tiny", tiny_llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory, byte_level_tokenizer: tokenizers.Tokenizer, wrap_tokenizer: Callable, tiny_llama: Callable
):
    """The folder that stands in for calibfuse/pretrained: a tiny calibrator, demo target and scorer."""
    from tiny_checkpoints import save_bundle

    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    return save_bundle(tmp_path_factory.mktemp("bundle"), tiny_llama(len(tokenizer)), tokenizer)


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture) -> Callable:
    """A function: arguments of the command line -> (exit code, standard output, standard error)."""
    from calibfuse.cli import main as cli

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(list(arguments))
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def load_tool(repository: Path) -> Callable:
    """A function: the name of a program in tools/ -> its module."""
    import importlib.util
    import sys

    if str(repository / "tools") not in sys.path:
        sys.path.append(str(repository / "tools"))  # as for a program that is run

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, repository / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up here
        spec.loader.exec_module(module)
        return module

    return load
