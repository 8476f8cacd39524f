"""Runs that are killed, stopped, damaged or started twice at random, and what must be true of them afterwards."""
