"""Guests for tests and for tools/quickstart: making their images, talking to their consoles."""
