"""The device processes: one per device, jailed, sharing guest memory."""
