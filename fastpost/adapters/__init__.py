"""What PEFT leaves out: LoRA+ learning rates, the preset of best practice, checks of files."""
