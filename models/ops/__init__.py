"""Computations with more than one implementation: a readable reference and its fast paths."""
