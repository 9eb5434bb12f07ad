"""From a config to an update: objective, optimizer, step, its memory, checkpoints of the state."""
