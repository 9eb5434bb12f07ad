"""marginface: compare large-margin losses for face recognition, fairly and at any scale."""

__version__ = "0.1.0"
