"""Attribute-controlled fine-tuning (Meng et al. 2024): oracle, auxiliary model, schedules of roles, tuned model."""
