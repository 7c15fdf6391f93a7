"""What every package may use: errors, settings, console, files, hardware, processes. Imports
nothing else of slim."""
