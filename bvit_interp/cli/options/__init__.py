"""Options of the commands: dataclasses that are light to import."""
