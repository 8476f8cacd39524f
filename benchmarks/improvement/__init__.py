"""The second paper's tables on a toy: pairs of degraded digits, several seeds."""
