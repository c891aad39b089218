"""Ways to read prompts other than densely; any of them goes with any policy (`Policy.prefill`)."""
