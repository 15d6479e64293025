"""From a module to a checkpoint."""
