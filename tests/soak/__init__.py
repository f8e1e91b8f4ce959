"""A thousand updates on a real server, under traffic and with faults; `make soak`."""
