"""The embedded demo: a real small model, real tasks with scorers, no network."""
