"""Trainers side by side: the same model, data, batch and dtype through ours and through a peer."""
