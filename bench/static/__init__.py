"""What the compiler makes of every Triton kernel, ours and our peers', without a GPU."""
