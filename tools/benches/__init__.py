"""One module per bench; each has main(arguments) -> exit status."""
