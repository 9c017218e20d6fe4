"""Where logged values go; each logger imports what it needs when it is asked for."""
