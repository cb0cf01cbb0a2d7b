"""The VM process and the command line that talks to it."""
