"""Evaluation: quality beside its dense ceiling (`eval.retrieval`), speed beside its floor (`eval.speed`)."""
