"""The commands, one file each. A module imports what it needs inside its function, so that `--help` stays fast."""
