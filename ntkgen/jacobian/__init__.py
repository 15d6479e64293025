"""From a network and a block of samples to factors, and from factors to kernel tiles."""
