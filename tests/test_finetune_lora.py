"""LoRA through peft, where it is installed; one sentence where it is not."""

import sys

import pytest
import torch

from calibfuse.errors import CheckpointError, MissingDependencyError
from calibfuse.finetune.lora import add_adapter, import_peft, load_adapter, merge_adapter


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'calibfuse\[lora\]'"):
        import_peft()


@pytest.fixture
def ids():
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(request, tiny_gpt2, tiny_llama):
    pytest.importorskip("peft", reason="needs the extra lora")
    return {"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]


def trained(model, ids):
    """A few steps on the adapter alone."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("build", ["gpt2", "llama"], indirect=True)
def test_fresh_adapter_changes_nothing_and_leaves_the_weights_frozen(build, ids):
    plain = build(64)(ids).logits.detach()
    model = build(64)
    wrapped = add_adapter(model, 2, seed=0)
    torch.testing.assert_close(wrapped(ids).logits, plain)
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora" in name for name in names)


@pytest.mark.parametrize("build", ["gpt2", "llama"], indirect=True)
def test_merged_model_is_the_adapted_one_and_an_ordinary_checkpoint(build, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    wrapped = trained(add_adapter(build(64), 2, seed=0), ids)
    adapted = wrapped(ids).logits.detach()
    assert not torch.allclose(adapted, build(64)(ids).logits)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = load_adapter(build(64), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, adapted)
    assert any(parameter.requires_grad for parameter in again.parameters()), "it can be trained further"
    merged = merge_adapter(wrapped)
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(ids).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", ["llama"], indirect=True)
def test_adapter_depends_on_the_seed_alone(build):
    def weights(seed):
        torch.rand(1)
        return [each.detach().clone() for each in add_adapter(build(64), 8, seed=seed).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize("build", ["llama"], indirect=True)
def test_a_folder_without_an_adapter_is_refused(build, tmp_path):
    with pytest.raises(CheckpointError, match="no LoRA adapter in"):
        load_adapter(build(64), tmp_path)
