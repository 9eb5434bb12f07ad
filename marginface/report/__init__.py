"""What a run leaves for people: pictures, a page, a table."""
