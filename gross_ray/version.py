"""The version of gross_ray, known also where it is not installed but only on the path."""

VERSION = "0.1.0"
"""As in pyproject.toml."""
