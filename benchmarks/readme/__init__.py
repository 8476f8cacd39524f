"""The generated tables of the README pages."""
