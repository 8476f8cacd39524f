"""The field's scores and pictures, for any checkpoint."""
