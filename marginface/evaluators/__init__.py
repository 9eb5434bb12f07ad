"""What a trained network is worth: each evaluator yields (name, value) pairs for a state."""
