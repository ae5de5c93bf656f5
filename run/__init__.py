"""What surrounds a run: configs, files, command lines, logging, stopping and going on."""
