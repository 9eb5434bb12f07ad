"""marginface beside what its user would otherwise pick, measured in one run."""
