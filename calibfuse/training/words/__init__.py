"""Words counted in the training text, and the names that are protected from them."""
