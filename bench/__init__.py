"""Benchmarks: ops, trainers, scale."""
