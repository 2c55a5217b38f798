"""From a target model, prompts and an oracle to a value guide: the whole run, as `calibfuse train-guide` does it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.calibrator import Calibrator
from calibfuse.errors import CheckpointError, DataError
from calibfuse.fusion import FusionConfig
from calibfuse.training.work_folder import SETTINGS_NAME, is_begun, write_json
from calibfuse.value.auxiliary import AuxiliaryModel, make_auxiliary_model
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig, train_auxiliary
from calibfuse.value.oracle import Oracle
from calibfuse.value.samples import SampleSet, SamplingPlan

logger = logging.getLogger(__name__)

_PROMPTS_PER_SHARD = 32
_HASHED_ELEMENTS = 100_000


@dataclass(frozen=True, kw_only=True)
class GuideConfig(SamplingPlan):
    """How to make a value guide."""

    per_prompt: int = 16  # continuations drawn of each prompt
    alpha: float = 1.0  # strength that the guide recommends; 1 is the q of the theory
    training: AuxiliaryTrainingConfig = field(default_factory=AuxiliaryTrainingConfig)  # its seed becomes the run's
    seed: int = 0  # of draws and fresh weights

    def __post_init__(self) -> None:
        super().__post_init__()
        FusionConfig(mode="value", alpha=self.alpha)


def train_guide(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    oracle: Oracle,
    output: str | os.PathLike[str],
    *,
    config: GuideConfig | None = None,
    calibrator: Calibrator | None = None,
    target_name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> dict[str, float]:
    """Make a value guide for a target model.

    Args:
        target: causal LM, on its device.
        tokenizer: the target's.
        prompts: what samples begin with.
        oracle: of the constraint.
        output: folder of the guide; working files go to `work/` inside, which can be deleted afterwards.
        config: how.
        calibrator: gets the value head; None: the bundled one.
        target_name: for the model card.
        facts: for the model card (name, license, ...).
        resume: go on with what is in `output`.
        show_progress: progress bars.

    Returns:
        The figures of the training; see `train_auxiliary`.

    Raises:
        DataError: there are no prompts, or too few samples.
        InputError: settings that do not fit together, or prompts that the target cannot read.
        ScorerError: the oracle failed.
        CheckpointError: files that cannot be read or written, or work of another run.
    """
    config = config or GuideConfig()
    place = Path(output)
    work = place / "work"
    if not prompts:
        raise DataError("A value guide needs prompts to draw samples from, got none.")
    # before the long work: whatever is wrong with the vocabulary
    auxiliary = make_auxiliary_model(target, tokenizer, seed=config.seed, calibrator=calibrator)
    settings = _settings(target, prompts, oracle, config, auxiliary)
    if not is_begun(work, settings, resume=resume):
        write_json(work / SETTINGS_NAME, settings)
    logger.info("Samples and checkpoints go to %s; after a stop, resume goes on from them", work)
    samples = _samples(target, tokenizer, prompts, oracle, config, work, show_progress=show_progress)
    training = replace(config.training, seed=config.seed)
    figures = train_auxiliary(auxiliary, target, samples, training, folder=work, show_progress=show_progress)
    unlabelled = int(samples.satisfaction.isnan().sum())
    told: dict[str, Any] = {
        "data": {"prompts": len(prompts), "samples": len(samples), "without a label": unlabelled},
        "settings": {"target": target_name or "in memory", "oracle": oracle.name, **asdict(config)},
        "figures": {name: round(value, 4) for name, value in figures.items() if math.isfinite(value)},
    }
    if warning := _doubt(figures, samples):
        logger.warning("%s", warning)
        told["limits"] = warning
    # what is known of the other heads stays
    known = {**auxiliary.calibrator.config.training, **(facts or {}), "value_head": {**told, **(facts or {})}}
    auxiliary.save_pretrained(place, fusion={"mode": "value", "alpha": config.alpha}, training=known)
    return figures


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
        seed = int(np.random.SeedSequence([config.seed, 51, number]).generate_state(1)[0])
        part = prompts[start : start + _PROMPTS_PER_SHARD]
        shards.append(config.draw(target, tokenizer, part, oracle, seed=seed, show_progress=show_progress))
        shards[-1].save(folder)
    samples = SampleSet.concatenate(shards)
    unlabelled = int(samples.satisfaction.isnan().sum())
    logger.info(
        "%s samples, mean C %.3f%s",
        f"{len(samples):,}",
        float(samples.satisfaction.nanmean()),
        f", {unlabelled} without a label left out" if unlabelled else "",
    )
    return samples


def _settings(
    target: PreTrainedModel, prompts: Sequence[str], oracle: Oracle, config: GuideConfig, auxiliary: AuxiliaryModel
) -> dict[str, Any]:
    parameters = {"target": next(target.parameters()), **dict(auxiliary.named_parameters())}
    # some of each: enough to tell models apart, quick for large ones
    beginnings = {name: each.reshape(-1)[:_HASHED_ELEMENTS] for name, each in parameters.items()}
    return {
        "target": hashlib.sha256(target.config.to_json_string().encode()).hexdigest(),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "oracle": oracle.name,
        "begins_with": hub.weights_fingerprint(beginnings),
        **{key: value for key, value in asdict(config).items() if key != "alpha"},
    }
