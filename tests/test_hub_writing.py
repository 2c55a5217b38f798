"""Tensors go to the file one by one: the same bytes as the library writes, without a copy, whole or not at all."""

import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse import hub
from calibfuse.errors import CheckpointError, InputError

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_the_bytes_are_those_of_the_library(kinds):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (dtype, shape) in kinds.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        hub.write_tensors(Path(folder) / "x", tensors, fingerprint=False, durable=False)
        assert (Path(folder) / "x").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_data_begin_where_asked_and_are_read_by_the_library(tmp_path):
    for size in range(1, 12):
        tensors = {"x" * size: torch.arange(float(size)), "y": torch.ones(2, dtype=torch.uint8)}
        hub.write_tensors(tmp_path / "x.safetensors", tensors, alignment=64)
        content = (tmp_path / "x.safetensors").read_bytes()
        assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
        found = safetensors.torch.load_file(tmp_path / "x.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_is_not_contiguous_or_shares_memory_is_written_as_it_reads(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": whole.t(), "whole": whole, "same": whole, "row": whole[1], "number": torch.tensor(2)}
    hub.write_tensors(tmp_path / "x.safetensors", tensors)
    found = hub.read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_without_a_place_in_the_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="'x' has the dtype torch.complex64"):
        hub.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, durable):
    hub.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    before = (tmp_path / "x.safetensors").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        hub.write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, durable=durable)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_large_tensors_are_not_copied(tmp_path):
    tensors = {"x": torch.zeros(1_000_000), "y": torch.ones(500_000)}
    tracemalloc.start()
    hub.write_tensors(tmp_path / "x.safetensors", tensors, fingerprint=False, durable=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
