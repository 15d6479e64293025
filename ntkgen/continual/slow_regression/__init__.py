"""Small networks on slowly changing regression: many seeds and algorithms as one computation."""
