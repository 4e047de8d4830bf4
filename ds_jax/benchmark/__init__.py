"""Measures how fast a model really is on this machine; see `__main__`."""
