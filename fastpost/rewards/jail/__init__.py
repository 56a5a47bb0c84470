"""What runs inside the sandbox: standard library only, loaded by `python -I -S`.

These files are imported as the top-level package `jail` in the sandboxed processes (so that no
third-party package is ever on the path there) and as `fastpost.rewards.jail` in the tests.
"""
