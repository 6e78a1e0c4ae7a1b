"""The version, for the build and for modules below the package's own."""

__version__ = "0.1.0"
