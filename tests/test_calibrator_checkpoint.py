"""Saving, loading and pushing a calibrator; what is refused, and that nothing half-written stays."""

import json
import os

import pytest
import safetensors.torch
import torch
from tiny_calibrators import make_calibrator, make_vocabulary

from calibfuse import hub
from calibfuse.calibrator import Calibrator, CalibratorConfig
from calibfuse.errors import CheckpointError, CheckpointFormatError, InputError
from calibfuse.hub.model_card import PLACEHOLDER


@pytest.fixture(scope="module")
def calibrator():
    return make_calibrator(fusion={"mode": "contrast", "alpha": 1.25}, training={"steps": 7, "data": ["a", "b"]})


@pytest.fixture
def folder(calibrator, tmp_path):
    return calibrator.save_pretrained(tmp_path / "calibrator")


def contents(folder):
    """Everything in a checkpoint; tensors apart, since safetensors orders its metadata at random."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return files | {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_round_trip_keeps_config_and_weights(calibrator, folder):
    loaded = Calibrator.from_pretrained(folder)
    assert loaded.config == calibrator.config
    assert not loaded.training
    for name, tensor in calibrator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16).float()), name


def test_full_precision_round_trip_is_exact_down_to_what_is_said(calibrator, tmp_path):
    calibrator.save_pretrained(tmp_path, dtype=torch.float32)
    loaded = Calibrator.from_pretrained(tmp_path)
    assert loaded.fingerprint == calibrator.fingerprint
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    one, other = (c.bind(make_vocabulary(), use_disk_cache=False) for c in (calibrator, loaded))
    assert torch.equal(one.log_probs(ids), other.log_probs(ids))


def test_saving_a_loaded_calibrator_changes_nothing(folder, tmp_path):
    again = Calibrator.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert contents(again) == contents(folder)


def test_files_are_json_safetensors_and_the_card(folder):
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["format_version"]) == ("calibfuse-calibrator", 1)
    assert all(
        tensor.dtype == torch.bfloat16 for tensor in safetensors.torch.load_file(folder / "model.safetensors").values()
    )


def test_the_default_shape_fits_the_bundle():
    """At most 12 MB on disk in bfloat16."""
    with torch.device("meta"):
        default = Calibrator(CalibratorConfig())
    assert 2 * sum(parameter.numel() for parameter in default.parameters()) < 12_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_in_memory(folder, dtype):
    loaded = Calibrator.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    bound = loaded.bind(make_vocabulary(), use_disk_cache=False)
    assert bound.log_probs(torch.tensor([[4, 5, 6]])).isfinite().all()


def test_fingerprint_tells_weights_and_shape_apart_but_not_recommendations(calibrator):
    same = make_calibrator(fusion={"alpha": 9.0}, training={"note": "other"})
    assert same.fingerprint == calibrator.fingerprint
    assert make_calibrator(seed=1).fingerprint != calibrator.fingerprint
    assert make_calibrator(window=9).fingerprint != calibrator.fingerprint


def test_replacing_an_older_checkpoint(folder):
    make_calibrator(seed=1).save_pretrained(folder)
    assert Calibrator.from_pretrained(folder).config.fusion == {}
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


class TestRefused:
    """One sentence each, always a CheckpointError."""

    def test_newer_format(self, folder):
        edit_config(folder, format_version=2)
        with pytest.raises(CheckpointFormatError, match="format version 2 .* reads versions up to 1; install a newer"):
            Calibrator.from_pretrained(folder)

    def test_config_of_something_else(self, folder):
        edit_config(folder, format="something-else")
        with pytest.raises(CheckpointError, match="calibfuse-calibrator.*its format is 'something-else'"):
            Calibrator.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"colour": "red"}, "Unknown keys in the calibrator's config: colour"),
            ({"max_token_norm": 0}, "max_token_norm must be a positive number, got 0"),
            ({"max_token_norm": float("inf")}, "max_token_norm must be a positive number, got inf"),
            ({"width": 0}, "width must be a positive integer, got 0"),
            ({"width": "32"}, "width must be a positive integer, got '32'"),
            ({"width": 30}, r"width \(30\) must be a multiple of twice head_count \(2\)"),
            ({"heads": []}, "heads must be distinct names"),
            ({"heads": ["calibrator", "calibrator"]}, "heads must be distinct names"),
        ],
    )
    def test_config_with_wrong_values(self, folder, changes, message):
        edit_config(folder, **changes)
        with pytest.raises(CheckpointError, match=f"config of the calibrator .* is not valid: .*{message}"):
            Calibrator.from_pretrained(folder)

    def test_weights_of_another_shape(self, folder):
        edit_config(folder, width=64)
        with pytest.raises(CheckpointError, match="Expected shape .* found"):
            Calibrator.from_pretrained(folder)

    def test_weights_without_a_head(self, folder):
        edit_config(folder, heads=["calibrator", "value"])
        with pytest.raises(CheckpointError, match=r"Expected a tensor 'heads.value"):
            Calibrator.from_pretrained(folder)

    @pytest.mark.parametrize("kept", [0, 7, 100, -1])
    def test_truncated_weights(self, folder, kept):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match="no whole safetensors file"):
            Calibrator.from_pretrained(folder)

    def test_a_flipped_bit(self, folder):
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1000] ^= 4
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            Calibrator.from_pretrained(folder)

    def test_a_pickle(self, folder):
        torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="no whole safetensors file"):
            Calibrator.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="there is no such file"):
            Calibrator.from_pretrained(folder)

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(CheckpointError):
            Calibrator.from_pretrained(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_older_checkpoint_as_it_was(folder):
    """A limit on the size of files stands for the disk: writing beyond it fails halfway, as it does there."""
    resource = pytest.importorskip("resource")
    before = contents(folder)
    changed = make_calibrator(seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError):
            changed.save_pretrained(folder)
        with pytest.raises(CheckpointError):
            changed.save_pretrained(folder.parent / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == before
    assert not list(folder.parent.glob("new/*"))


def test_a_folder_that_cannot_be_made(calibrator, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError):
        calibrator.save_pretrained(tmp_path / "file" / "calibrator")


def test_push_uploads_what_save_writes(calibrator, folder, monkeypatch):
    seen = {}

    def upload(path, repo_id, **options):
        seen.update(repo_id=repo_id, options=options, files=contents(path))
        return "https://hub.example/commit/1"

    monkeypatch.setattr(hub, "upload_folder", upload)
    url = calibrator.push_to_hub("someone/calibrator", private=True, revision="branch", token="secret")
    assert url == "https://hub.example/commit/1"
    assert seen["repo_id"] == "someone/calibrator"
    assert (seen["options"]["private"], seen["options"]["revision"], seen["options"]["token"]) == (
        True,
        "branch",
        "secret",
    )
    expected = contents(folder)
    card = expected["README.md"].decode()
    assert card.count(PLACEHOLDER)
    assert seen["files"] == {**expected, "README.md": card.replace(PLACEHOLDER, "someone/calibrator").encode()}


def test_the_hub_gets_revision_cache_and_offline_mode(calibrator, folder, monkeypatch, tmp_path):
    seen = {}

    def resolve(name, **options):
        seen.update(name=name, **options)
        return folder

    monkeypatch.setattr(hub, "resolve_checkpoint", resolve)
    Calibrator.from_pretrained(
        "someone/calibrator", revision="v1", cache_dir=tmp_path, local_files_only=True, token="t"
    )
    assert seen == {
        "name": "someone/calibrator",
        "revision": "v1",
        "cache_dir": tmp_path,
        "local_files_only": True,
        "token": "t",
    }


class TestConfig:
    """CalibratorConfig."""

    def test_dictionary_round_trip(self):
        config = CalibratorConfig(width=64, heads=("calibrator",), fusion={"alpha": 2.0})
        restored = CalibratorConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert restored == config
        assert restored.heads == ("calibrator",)

    def test_positional_values_are_refused(self):
        with pytest.raises(TypeError):
            CalibratorConfig(64)

    @pytest.mark.parametrize("name", ["bucket_count", "token_width", "layer_count", "window", "adapter_width"])
    @pytest.mark.parametrize("value", [0, -3, 1.5, True, None])
    def test_sizes_are_positive_integers(self, name, value):
        with pytest.raises(InputError, match=f"CalibratorConfig.{name} must be a positive integer, got {value!r}"):
            CalibratorConfig(**{name: value})
