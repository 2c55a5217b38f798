"""From a target model, prompts and an oracle to a value guide: the whole run, as `calibfuse train-guide` does it.

Order of work: draw and label samples (cached in shards), train the auxiliary model (checkpoints), write the guide with
its model card. A killed run goes on where it was: at the next shard, or at the last checkpoint of the training. The
guide is decoded with by CalibFusion in mode "value".
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.calibrator import Calibrator
from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.fusion import FusionConfig
from calibfuse.value.auxiliary import AuxiliaryModel, CalibratorAuxiliary, make_auxiliary_model
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig, train_auxiliary
from calibfuse.value.oracle import Oracle
from calibfuse.value.samples import SampleSet, draw_samples, label_samples

logger = logging.getLogger(__name__)

WORK_NAME, SETTINGS_NAME = "work", "settings.json"
_PROMPTS_PER_SHARD = 32
_HASHED_ELEMENTS = 100_000


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """How to make a value guide.

    Attributes:
        kind: "calibrator" (a value head on a universal calibrator) or "language-model" (a small LM of its own).
        parameterisation: "nado", or of a language model "dinado".
        per_prompt: continuations drawn of each prompt.
        max_new_tokens: length of the continuations.
        temperature: of the draw; above 1 draws rarer continuations, and their weights undo it.
        sampling_batch_size: rows per forward pass of the target while sampling.
        continuation_only: show the oracle the continuation without its prompt.
        chat: put each prompt into the tokenizer's chat template; the oracle then sees the continuation alone.
        system: system message of the chat template; implies `chat`.
        alpha: strength that the guide recommends; 1 is the q of the theory.
        training: of the auxiliary model.
        seed: of draws and fresh weights.
    """

    kind: str = "calibrator"
    parameterisation: str = "nado"
    per_prompt: int = 16
    max_new_tokens: int = 20
    temperature: float = 1.0
    sampling_batch_size: int = 64
    continuation_only: bool = False
    chat: bool = False
    system: str | None = None
    alpha: float = 1.0
    training: AuxiliaryTrainingConfig = AuxiliaryTrainingConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        FusionConfig(mode="value", alpha=self.alpha)
        for name in ("per_prompt", "max_new_tokens", "sampling_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"The sampling temperature must be a number above 0, got {self.temperature}.")


@dataclass(frozen=True)
class GuideResult:
    """What a run made.

    Attributes:
        output: folder of the guide; `CalibFusion.from_pretrained` loads it.
        figures: of the training; see `train_auxiliary`.
    """

    output: Path
    figures: dict[str, float]


def train_guide(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    oracle: Oracle,
    output: str | os.PathLike[str],
    *,
    config: GuideConfig | None = None,
    calibrator: Calibrator | None = None,
    backbone: PreTrainedModel | None = None,
    target_name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> GuideResult:
    """Make a value guide for a target model.

    Args:
        target: causal LM, on its device.
        tokenizer: the target's.
        prompts: what samples begin with.
        oracle: of the constraint.
        output: folder of the guide; working files go to `work/` inside, which can be deleted afterwards.
        config: how.
        calibrator: gets the value head; None: the bundled one.
        backbone: of kind "language-model": a causal LM on the target's ids whose layers the guide begins with.
        target_name: for the model card.
        facts: for the model card (name, license, ...).
        resume: go on with what is in `output`.
        show_progress: progress bars.

    Returns:
        The folder and the figures.

    Raises:
        DataError: there are no prompts, or too few samples.
        InputError: settings that do not fit together, or prompts that the target cannot read.
        ScorerError: the oracle failed.
        CheckpointError: files that cannot be read or written, or work of another run.
    """
    config = config or GuideConfig()
    place = Path(output)
    work = place / WORK_NAME
    if resume and not (work / SETTINGS_NAME).exists():
        raise CheckpointError(f"There is nothing to go on from in {str(output)!r} yet: run it without resume.")
    if not prompts:
        raise DataError("A value guide needs prompts to draw samples from, got none.")
    # before the long work: whatever is wrong with kind, vocabulary or backbone
    auxiliary = make_auxiliary_model(
        target,
        tokenizer,
        kind=config.kind,
        parameterisation=config.parameterisation,
        seed=config.seed,
        calibrator=calibrator,
        backbone=backbone,
    )
    _open_work(work, _settings(target, prompts, oracle, config, auxiliary), resume=resume)
    logger.info("Samples and checkpoints go to %s; after a stop, resume goes on from them", work)
    samples = _samples(target, tokenizer, prompts, oracle, config, work, show_progress=show_progress)
    figures = train_auxiliary(
        auxiliary,
        target,
        samples,
        replace(config.training, seed=config.seed),
        folder=work,
        show_progress=show_progress,
    )
    warning = _doubt(figures, samples)
    if warning:
        logger.warning("%s", warning)
    unlabelled = int(samples.satisfaction.isnan().sum())
    told = {
        "data": {"prompts": len(prompts), "samples": len(samples), "without a label": unlabelled},
        "settings": {"target": target_name or "in memory", "oracle": oracle.name, **_plain(config)},
        "figures": {name: round(value, 4) for name, value in figures.items() if math.isfinite(value)},
        **({"limits": warning} if warning else {}),
        **(facts or {}),
    }
    if isinstance(auxiliary, CalibratorAuxiliary):  # what is known of the other heads stays
        told = {**auxiliary.calibrator.config.training, **(facts or {}), "value_head": told}
    auxiliary.save_pretrained(place, fusion={"mode": "value", "alpha": config.alpha}, training=told)
    return GuideResult(place, figures)


def _doubt(figures: Mapping[str, float], samples: SampleSet) -> str | None:
    """What makes the guide useless, if anything: it predicts held-out labels no better than their mean does."""
    if figures["held_out_bce"] < figures["prior_bce"]:
        return None
    refused = float((1.0 - samples.satisfaction).nansum())
    return (
        f"The guide has learned nothing: held-out cross-entropy {figures['held_out_bce']:.4f} nats per token, "
        f"{figures['prior_bce']:.4f} without a guide. The oracle refused {refused:.0f} of {len(samples)} samples; give "
        "prompts that lead to refused text, more of them, or more samples of each."
    )


def _samples(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    oracle: Oracle,
    config: GuideConfig,
    work: Path,
    *,
    show_progress: bool,
) -> SampleSet:
    """All samples, labelled; shard by shard, those that lie in `work` already are read."""
    shards = []
    starts = range(0, len(prompts), _PROMPTS_PER_SHARD)
    for number, start in enumerate(starts):
        folder = work / f"samples-{number:04d}"
        try:
            shards.append(SampleSet.load(folder))
            continue
        except CheckpointError:  # not drawn yet, or torn by a kill: it is drawn anew
            pass
        if show_progress:
            logger.info("samples: part %d of %d", number + 1, len(starts))
        shard = draw_samples(
            target,
            tokenizer,
            prompts[start : start + _PROMPTS_PER_SHARD],
            per_prompt=config.per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=int(np.random.SeedSequence([config.seed, 51, number]).generate_state(1)[0]),
            batch_size=config.sampling_batch_size,
            chat=config.chat,
            system=config.system,
            show_progress=show_progress,
        )
        alone = config.continuation_only or config.chat or config.system is not None
        shard = label_samples(shard, tokenizer, oracle, continuation_only=alone)
        shard.save(folder)
        shards.append(shard)
    samples = SampleSet.concatenate(shards)
    unlabelled = int(samples.satisfaction.isnan().sum())
    logger.info(
        "%s samples, mean C %.3f%s",
        f"{len(samples):,}",
        float(samples.satisfaction.nanmean()),
        f", {unlabelled} without a label left out" if unlabelled else "",
    )
    return samples


def _open_work(work: Path, settings: dict[str, Any], *, resume: bool) -> None:
    path = work / SETTINGS_NAME
    if path.exists():
        if not resume:
            raise CheckpointError(
                f"{str(work.parent)!r} holds the work of an earlier run: go on with resume, or choose another "
                "output folder."
            )
        former = hub.read_json(path, "settings of a value guide's training")
        changed = sorted(key for key in {*former, *settings} if former.get(key) != settings.get(key))
        if changed:
            raise CheckpointError(
                f"The work in {str(work.parent)!r} was begun with other settings ({', '.join(changed)}); resume with "
                "the same ones, or choose another output folder."
            )
        return
    hub.write_files(work, {SETTINGS_NAME: (json.dumps(settings, indent=2) + "\n").encode("utf-8")})


def _settings(
    target: PreTrainedModel, prompts: Sequence[str], oracle: Oracle, config: GuideConfig, auxiliary: AuxiliaryModel
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON knows it."""
    fresh = hashlib.sha256()
    for name, parameter in sorted(auxiliary.named_parameters()):
        fresh.update(name.encode())
        fresh.update(_head(parameter))
    weights = next(target.parameters())
    about = hashlib.sha256(repr(sorted(target.config.to_dict().items(), key=str)).encode())
    about.update(_head(weights))
    settings: dict[str, Any] = {
        "target": about.hexdigest(),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "oracle": oracle.name,
        "begins_with": fresh.hexdigest(),
        **{key: value for key, value in _plain(config).items() if key != "alpha"},
    }
    decoded: dict[str, Any] = json.loads(json.dumps(settings))
    return decoded


def _plain(config: GuideConfig) -> dict[str, Any]:
    values = asdict(config)
    training = values.pop("training")
    training.pop("seed")
    return {**values, **{f"training_{key}": value for key, value in training.items()}}


def _head(tensor: torch.Tensor) -> bytes:
    """Some of a tensor's contents: enough to tell models apart, quick for large ones."""
    part = tensor.detach().reshape(-1)[:_HASHED_ELEMENTS].to("cpu", torch.float32)
    return part.contiguous().numpy().tobytes()
