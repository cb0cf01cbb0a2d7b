"""What builds, checks and tests pyvmd; never installed."""
