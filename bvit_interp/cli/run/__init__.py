"""What the commands do, imported once the options are read."""
