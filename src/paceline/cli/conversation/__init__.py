"""The parts of `paceline chat`: what was said, commands, input, screen and saved files."""
