"""Language models to generate with, and how they continue prompts."""
