"""A conversation in a terminal: what ``edge-shiftkv chat`` shows and does."""
