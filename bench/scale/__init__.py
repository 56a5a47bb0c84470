"""What an optimizer step of 8B, 32B and 70B takes: ours and stock TRL's, both traced."""
