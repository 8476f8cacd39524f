"""What an evaluation shows: its figures with their uncertainty, its tables, its page."""
