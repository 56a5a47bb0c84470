"""Whether `fastpost plan` predicts what a run really takes."""
