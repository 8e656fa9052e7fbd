"""The commands: options to settings, answers to text, errors to exit codes."""
