"""Whether a stored kernel can be trusted."""
