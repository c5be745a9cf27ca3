"""Speed and memory of the commands: what the project claims, measured."""
