"""From a name to samples in one fixed order."""
