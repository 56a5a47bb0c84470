"""Decontamination and mixing, measured."""
