"""Sub-center cleaning: finds wrong labels with a finished run; `python -m marginface.clean`."""
