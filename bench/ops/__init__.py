"""Microbenchmarks of single ops."""

import os

# The profiler that counts bytes announces every start on stderr, at level 5. Read when torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
