"""LoRA, DoRA, QLoRA and QDoRA steps of SmolLM2: ours against PEFT's (and bitsandbytes')."""
