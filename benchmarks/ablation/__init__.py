"""The paper's ablations on a toy: digits, a tiny model, several seeds."""
