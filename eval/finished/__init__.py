"""Finished runs, read back from their folders, named, and set beside each other."""
