"""lm-evaluation-harness with the fusion on: utility benchmarks of a guided model.

    python -m calibfuse.lm_eval run --model calibfuse --model_args pretrained=org/any-llm,alpha=1 --tasks lambada_openai

The harness's own `hf` model has no place for logits processors, and its log-likelihood tasks never call `generate()`.
"""

from __future__ import annotations

from typing import Any

from calibfuse.errors import InputError, MissingDependencyError
from calibfuse.processor import CalibFusion

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependencyError(
        "calibfuse.lm_eval needs lm-evaluation-harness: pip install 'calibfuse[lm-eval]'."
    ) from error


@register_model("calibfuse")
class CalibFusionLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model, guided by a calibrator.

    `pretrained` and `options` are those of the harness's `hf` model, the others those of `CalibFusion.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: Any,  # noqa: ANN401
        *,
        calibrator: str | None = None,
        alpha: float | None = None,
        mode: str | None = None,
        margin: float | None = None,
        max_shift: float | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(pretrained, **options)
        if self.model.config.is_encoder_decoder:
            raise InputError("calibfuse.lm_eval expects a decoder-only target, got an encoder-decoder model.")
        given = {"alpha": alpha, "mode": mode, "margin": margin, "max_shift": max_shift}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.fusion = CalibFusion.from_pretrained(calibrator, tokenizer=self.tokenizer, target=self.model, **chosen)

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:  # noqa: ANN401
        # The harness pads on the right, where causal attention makes it harmless: no mask is needed.
        logits = super()._model_call(inps, attn_mask, labels)
        return self.fusion.fuse_logits(inps, logits)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:  # noqa: ANN401
        return super()._model_generate(context, max_length, stop, logits_processor=[self.fusion], **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
