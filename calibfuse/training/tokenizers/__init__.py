"""The pool of tokenizers that a universal calibrator is trained on."""
