"""Checkpoints: found, read, written and published; everything that can be wrong with one gives one sentence.

What needs a Hub runs in one client process against `loopback_hub`, because huggingface_hub reads its environment when
it is imported. The test process itself is offline (see conftest).
"""

import json
import os
import pickle
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import pytest
import safetensors.torch
import torch
from loopback_hub import LoopbackHub

from calibfuse import hub
from calibfuse.errors import CheckpointError, CheckpointFormatError, InputError, VocabularyError
from calibfuse.processor import CalibFusion

CONFIG = {"format": "calibfuse-test", "format_version": 1, "width": 4}
SHAPES = {"a.weight": (4, 3), "scale": ()}


@pytest.fixture
def tensors():
    return {"a.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3), "scale": torch.tensor(2.5)}


@pytest.fixture
def checkpoint(tmp_path, tensors):
    folder = tmp_path / "checkpoint"
    hub.write_checkpoint(folder, config=CONFIG, tensors=tensors, files={"README.md": "# Ünïcode\n"})
    return folder


def read_config(folder, version=1):
    return hub.read_config(folder, format_name="calibfuse-test", supported_version=version)


# ---- finding


def test_nothing_given_means_the_bundled_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_BUNDLED", tmp_path)
    (tmp_path / "small").mkdir()
    assert hub.resolve_checkpoint(None, default="small") == tmp_path / "small"


def test_a_missing_bundled_checkpoint_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_BUNDLED", tmp_path)
    with pytest.raises(CheckpointError, match="bundled checkpoint 'large' is missing"):
        hub.resolve_checkpoint(None, default="large")


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve_checkpoint(tmp_path) == tmp_path
    assert hub.resolve_checkpoint(str(tmp_path)) == tmp_path
    assert hub.resolve_checkpoint("org/name").samefile(tmp_path / "org" / "name")
    assert hub.resolve_checkpoint("~/org").samefile(tmp_path / "org")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "a b", "nowhere/", "-x"])
def test_what_can_only_be_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        hub.resolve_checkpoint(name)


def test_a_path_object_is_never_a_hub_id(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        hub.resolve_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "  "], ids=["empty", "blank"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(CheckpointError, match="Expected a folder or a Hub id"):
        hub.resolve_checkpoint(name)


def test_a_file_is_no_checkpoint(checkpoint):
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        hub.resolve_checkpoint(checkpoint / "config.json")


def test_a_revision_of_a_local_folder_is_refused(checkpoint):
    with pytest.raises(InputError, match="Revision 'v2' was given"):
        hub.resolve_checkpoint(checkpoint, revision="v2")


def test_offline_and_not_cached_says_so():
    """The test session is offline (see conftest)."""
    with pytest.raises(CheckpointError, match="'org/name': there is no such folder here, it is not in the Hub's cache"):
        hub.resolve_checkpoint("org/name", local_files_only=True)


# ---- round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_what_was_written_is_read_back_exactly(tmp_path, dtype):
    tensors = {"x": torch.arange(-3, 9).reshape(3, 4).to(dtype), "one": torch.tensor(1).to(dtype)}
    tensors["none"] = torch.zeros(0, 5, dtype=dtype)
    hub.write_checkpoint(tmp_path, config=CONFIG, tensors=tensors)
    found = hub.read_tensors(tmp_path / hub.WEIGHTS_NAME)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    assert read_config(tmp_path) == CONFIG


def test_views_and_shared_memory_are_stored_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.T, "strided": base[:, ::2], "base": base, "parameter": torch.nn.Parameter(base)}
    hub.write_checkpoint(tmp_path, config=CONFIG, tensors=tensors)
    found = hub.read_tensors(tmp_path / hub.WEIGHTS_NAME)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_further_files_are_written_in_utf8(checkpoint):
    assert (checkpoint / "README.md").read_text(encoding="utf-8") == "# Ünïcode\n"
    assert {path.name for path in checkpoint.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_written_files_are_readable_by_others(checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (checkpoint / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


def test_the_fingerprint_depends_on_names_dtypes_shapes_and_contents_only():
    x = torch.arange(4, dtype=torch.int32)
    fingerprint = hub.weights_fingerprint({"a": x, "b": x})
    assert fingerprint == hub.weights_fingerprint({"b": x.clone(), "a": x})
    others = [{"a": x}, {"a": x, "c": x}, {"a": x, "b": x + 1}, {"a": x, "b": x.view(2, 2)}]
    others.append({"a": x, "b": x.view(torch.float32)})
    assert len({fingerprint, *map(hub.weights_fingerprint, others)}) == 6


# ---- configurations


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[1, 2]", "it holds a list"),
        (b'{"model_type": "llama"}', "but its model_type is 'llama'"),
        (b'{"format": "something"}', "but its format is 'something'"),
        (b'{"width": 4}', "has no entry 'format'"),
        (b'{"format": "calibfuse-test"}', "format_version of 1 or more .* found None"),
        (b'{"format": "calibfuse-test", "format_version": true}', "found True"),
        (b'{"format": "calibfuse-test", "format_version": "2"}', "found '2'"),
        (b'{"format": "calibfuse-test", "format_version": 0}', "found 0"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_ours_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused_by_version(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"format_version": 3}))
    assert read_config(tmp_path, version=3)["format_version"] == 3
    with pytest.raises(CheckpointFormatError, match=r"format version 3 .* up to 2; install a newer calibfuse"):
        read_config(tmp_path, version=2)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"configuration of a calibfuse-test in .*config\.json.* no such file"):
        read_config(tmp_path)


# ---- weights


def damaged(data, how):
    header = int.from_bytes(data[:8], "little")
    return {
        "empty": b"",
        "only-length": data[:8],
        "header-cut": data[: 8 + header // 2],
        "data-cut": data[:-1],
        "longer": data + b"\0",
        "huge-header": (2**60).to_bytes(8, "little") + data[8:],
        "flipped-bit": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pickle": pickle.dumps({"a": 1}),
        "zip": b"PK\x03\x04" + bytes(100),
    }[how]


@pytest.mark.parametrize(
    "how",
    "empty only-length header-cut data-cut longer huge-header flipped-bit text pickle zip".split(),
)
def test_damaged_weights_are_refused_with_one_sentence(checkpoint, how):
    path = checkpoint / hub.WEIGHTS_NAME
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        hub.read_tensors(path, expected=SHAPES)
    assert "\n" not in str(caught.value)


def test_a_torch_checkpoint_is_never_loaded(tmp_path):
    torch.save({"a.weight": torch.zeros(4, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        hub.read_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("place", ["nowhere.safetensors", "."], ids=["missing", "folder"])
def test_weights_that_are_no_file(checkpoint, place):
    with pytest.raises(CheckpointError, match="Expected weights"):
        hub.read_tensors(checkpoint / place)


def test_the_tensors_must_be_the_expected_ones(checkpoint):
    path = checkpoint / hub.WEIGHTS_NAME
    assert hub.read_tensors(path, expected=SHAPES).keys() == SHAPES.keys()
    with pytest.raises(CheckpointError, match=r"Expected a tensor 'b' of shape \(2,\) .* has none"):
        hub.read_tensors(path, expected=SHAPES | {"b": (2,)})
    with pytest.raises(CheckpointError, match=r"Expected shape \(3, 4\) for the tensor 'a.weight' .* found \(4, 3\)"):
        hub.read_tensors(path, expected=SHAPES | {"a.weight": (3, 4)})
    with pytest.raises(CheckpointError, match=r"has a tensor 'scale' of shape \(\) that does not belong"):
        hub.read_tensors(path, expected={"a.weight": (4, 3)})


def test_weights_of_another_program_need_no_fingerprint(tmp_path, tensors):
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(hub.read_tensors(tmp_path / "model.safetensors")["scale"], tensors["scale"])


# ---- writing under difficulties


@contextmanager
def small_disk():
    """No file may grow beyond 10 kB: a real limit, enforced by the system, in the place of a full disk.

    Not a fixture: pytest prints a test's dot before it takes the fixtures down, and its own output may go to a file
    longer than the limit.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    old, new = tmp_path / "old", tmp_path / "made" / "new"
    hub.write_checkpoint(old, config=CONFIG, tensors={"x": torch.zeros(10)})
    for folder in (old, new):
        with small_disk(), pytest.raises(CheckpointError, match=f"Cannot write '{folder}': File too large"):
            hub.write_checkpoint(folder, config=CONFIG, tensors={"x": torch.ones(10_000)})
    assert {path.name for path in old.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(hub.read_tensors(old / "model.safetensors")["x"], torch.zeros(10))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_whatever_call_fails_no_checkpoint_looks_whole_that_is_not(
    tmp_path, checkpoint, tensors, monkeypatch, step, failing_call
):
    calls = []
    original = getattr(os, step)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, step, fail)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match="No space left on device"):
        hub.write_checkpoint(checkpoint, config=CONFIG | {"width": 5}, tensors=newer, files={"README.md": "new"})
    assert not list(checkpoint.glob("*.tmp"))
    assert not list(checkpoint.glob(".*"))
    if step == "fsync":  # before anything was renamed: the old checkpoint is untouched
        assert read_config(checkpoint) == CONFIG
        assert torch.equal(hub.read_tensors(checkpoint / "model.safetensors")["scale"], tensors["scale"])
    else:
        with pytest.raises(CheckpointError, match="no such file"):
            read_config(checkpoint)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, tensors):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Cannot write"):
        hub.write_checkpoint(tmp_path / "file" / "checkpoint", config=CONFIG, tensors=tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "x"}, "needs 'format' and 'format_version'"),
        (CONFIG | {"rate": float("nan")}, "cannot be written as JSON"),
        (CONFIG | {"device": object()}, "cannot be written as JSON"),
    ],
    ids=["no-version", "nan", "object"],
)
def test_a_configuration_that_could_not_be_read_again_is_not_written(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        hub.write_checkpoint(tmp_path / "new", config=config, tensors={})
    assert not (tmp_path / "new").exists()


# ---- the Hub

CLIENT = """
import json, sys
from calibfuse import hub
from calibfuse.errors import CheckpointError
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        answer = str(getattr(hub, name)(**options))
    except CheckpointError as error:
        answer = f"error: {error}"
    print(json.dumps(answer), flush=True)
"""


class Client:
    """Calls functions of `calibfuse.hub` in a process of its own that knows only the loopback Hub."""

    def __init__(self, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def call(self, name, **options):
        """The result of a function as text; "error: ..." where it raised CheckpointError."""
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the client process died; its traceback is on standard error"
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with LoopbackHub() as server:
        client = Client(server.environment(tmp_path_factory.mktemp("home")))
        yield server, client
        client.close()


@pytest.fixture
def server(running):
    running[0].clear()
    return running[0]


@pytest.fixture
def resolve(running, tmp_path):
    """`resolve_checkpoint` in the client, with a cache of its own for each test."""
    return lambda name, **options: running[1].call(
        "resolve_checkpoint", name_or_path=name, cache_dir=str(tmp_path / "cache"), **options
    )


@pytest.fixture
def push(running, checkpoint):
    """`upload_folder` of the checkpoint in the client, with its token unless another is given."""
    return lambda repo_id, **options: running[1].call(
        "upload_folder", folder=str(checkpoint), repo_id=repo_id, **options
    )


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_safetensors_json_and_the_readme_are_downloaded(server, resolve, checkpoint):
    unwanted = {"pytorch_model.bin": b"x", "code.py": b"x", "data.pkl": b"x", "notes.md": b"x"}
    server.add("org/name", files_of(checkpoint) | unwanted)
    folder = hub.resolve_checkpoint(resolve("org/name"))
    assert files_of(folder) == files_of(checkpoint)
    assert read_config(folder) == CONFIG
    assert not server.asked(r"\.(bin|py|pkl)$|notes")


def test_a_download_shows_the_progress_bar_of_the_client_also_after_transformers_was_quieted(
    server, checkpoint, tmp_path
):
    server.add("org/name", files_of(checkpoint))
    code = (
        "from calibfuse import hub; from calibfuse.loading import quiet_transformers\n"
        "with quiet_transformers(): hub.resolve_checkpoint('org/name')"
    )
    environment = {**os.environ, **server.environment(tmp_path / "home")}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "100%" in done.stderr


def test_revisions_are_told_apart_and_the_cache_serves_offline(server, resolve, checkpoint, tmp_path):
    old = server.add("org/name", files_of(checkpoint))
    server.add("org/name", {"config.json": b"{}"})
    server.add("org/name", {"config.json": b'{"branch": 1}'}, revision="dev")
    revisions = (None, "dev", old)
    found = [resolve("org/name", revision=revision) for revision in revisions]
    contents = [hub.read_json(f"{folder}/config.json", "configuration") for folder in found]
    assert contents == [{}, {"branch": 1}, CONFIG]

    asked = len(server.requests)
    assert [resolve("org/name", revision=revision, local_files_only=True) for revision in revisions] == found
    here = [hub.resolve_checkpoint("org/name", revision=each, cache_dir=tmp_path / "cache") for each in revisions]
    assert [str(folder) for folder in here] == found, "HF_HUB_OFFLINE, which is set for the tests"
    assert len(server.requests) == asked


def test_a_cached_checkpoint_is_not_downloaded_again(server, resolve, checkpoint):
    server.add("org/name", files_of(checkpoint))
    assert resolve("org/name") == resolve("org/name")
    assert len(server.asked(r"^GET .*resolve.*model\.safetensors")) == 1


def test_what_the_hub_has_not_or_does_not_give_is_one_sentence(server, resolve, checkpoint):
    server.add("org/name", files_of(checkpoint))
    server.add("org/gated", files_of(checkpoint))
    server.gated.add("org/gated")
    missing = "there is no such folder here and no such repository on the Hub"
    refused = "error: Cannot get the checkpoint"
    assert resolve("org/missing").startswith(f"{refused} 'org/missing': {missing}")
    assert resolve("missing").startswith(f"{refused} 'missing': {missing}")
    assert resolve("org/gated").startswith(f"{refused} 'org/gated': access to it must be requested")
    revision = resolve("org/name", revision="v9")
    assert revision == f"{refused} 'org/name' at revision 'v9': the repository has no such revision."
    assert resolve("a--b..c") == f"{refused} 'a--b..c': this is not a valid name of a repository on the Hub."


@pytest.mark.parametrize("status", [403, 500])
def test_a_hub_that_fails_is_one_sentence(server, resolve, push, status):
    server.failing = status
    for answer in (resolve("org/name"), push("org/name")):
        assert answer.startswith("error: Cannot ")
        assert "org/name" in answer
        assert "\n" not in answer


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    unreachable = LoopbackHub()
    unreachable._server.server_close()
    client = Client(unreachable.environment(tmp_path))
    answer = client.call("resolve_checkpoint", name_or_path="org/name")
    client.close()
    assert "not in the Hub's cache, and the Hub was not asked or not reached" in answer


def test_a_model_is_asked_for_once_and_refused_in_one_sentence(server, running, checkpoint, tmp_path):
    server.add("org/name", files_of(checkpoint))
    check = partial(running[1].call, "check_repository")
    assert check(repo_id="org/name") == "None"
    missing = check(repo_id="org/missing")
    assert missing.startswith("error: Cannot get the model 'org/missing': there is no such folder here and no such")
    assert len(server.asked(r"missing")) == 1
    assert "no such revision" in check(repo_id="org/name", revision="v9")
    assert check(repo_id="org/missing", local_files_only=True) == "None"


def test_a_hub_that_cannot_be_reached_is_asked_once_for_a_model(tmp_path):
    unreachable = LoopbackHub()
    unreachable._server.server_close()
    client = Client(unreachable.environment(tmp_path))
    start = time.monotonic()
    answer = client.call("check_repository", repo_id="org/name")
    client.close()
    assert "not in the Hub's cache, and the Hub was not reached" in answer
    assert time.monotonic() - start < 20.0  # the loaders' retries take a minute


def test_a_tokenizer_of_an_unreached_hub_is_asked_for_once(monkeypatch):
    """The client's own downloads try again and again, for half a minute."""
    asked = []

    def fail(*arguments, **_):
        asked.append(arguments)
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(VocabularyError, match="'nowhere-at-all': there is no such folder here"):
        CalibFusion.from_pretrained(tokenizer="nowhere-at-all")
    assert len(asked) == 1


def test_a_pushed_checkpoint_comes_back_the_same(server, push, resolve, checkpoint):
    (checkpoint / "optimizer.bin").write_bytes(b"not for the Hub")
    assert push("org/new", private=True, commit_message="first") == f"{server.address}/org/new"
    repository = server.repositories["org/new"]
    assert repository.private
    assert repository.messages[-1] == "first"
    assert set(repository.files()) - {".gitattributes"} == {"config.json", "model.safetensors", "README.md"}
    folder = hub.resolve_checkpoint(resolve("org/new"))
    assert files_of(folder)["model.safetensors"] == files_of(checkpoint)["model.safetensors"]


def test_a_push_may_be_repeated_and_go_to_a_branch(server, push):
    for revision in (None, None, "dev"):
        assert push("org/new", revision=revision) == f"{server.address}/org/new"
    repository = server.repositories["org/new"]
    assert set(repository.branches) == {"main", "dev"}
    assert "config.json" in repository.files("dev")


def test_a_push_that_is_not_allowed_is_one_sentence(server, push):
    answer = push("org/new", token="hf_of_somebody_else")
    assert answer.startswith("error: Cannot push to 'org/new'")
    assert "log in with `hf auth login`" in answer
    assert "hf_of_somebody_else" not in answer
    assert not server.repositories


def test_a_push_while_offline_is_one_sentence(checkpoint):
    with pytest.raises(CheckpointError, match=r"Cannot push to 'org/new': the Hub is in offline mode"):
        hub.upload_folder(checkpoint, "org/new")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_not_pushed(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        hub.upload_folder(checkpoint, "org/new")
