"""Mode "embedding": fusion of last hidden states (Tian et al. 2025), in one place."""
