"""The version, alone, so that the build reads it without imports."""

__version__ = '0.1.0'
