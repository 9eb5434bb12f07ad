"""What one run leaves for people: a page, a table, pictures."""
