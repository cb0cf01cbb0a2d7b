"""Other monitors with devices of ours."""
