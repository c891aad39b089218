"""Evaluation: quality beside its dense ceiling, speed beside its floor."""
