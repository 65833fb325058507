"""One file an operation; each is found by its name alone."""
