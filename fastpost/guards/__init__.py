"""Checks that stop a run before it is silently ruined."""
