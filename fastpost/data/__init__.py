"""Training data before training: decontaminated, mixed, described. Nothing here imports torch."""
