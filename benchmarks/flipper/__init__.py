"""Whether the flipper's sign, which looks at the winner alone, tells anything about the loser."""
