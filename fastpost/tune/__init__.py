"""What `fastpost tune` does: measures each choice of the kernels on this machine's GPU."""
