"""Generated tasks: filler text, and facts hidden in it."""
