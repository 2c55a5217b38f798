"""Training of the universal calibrator: reading text, sorting it, the pool of tokenizers, and the training itself."""
