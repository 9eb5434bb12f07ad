"""What many runs leave for people: rows, comparisons, tables, pictures."""
