"""What fits on a card, by the plan."""
