"""What `fastpost doctor` looks at: the environment, and the kernels on this machine's GPU."""
