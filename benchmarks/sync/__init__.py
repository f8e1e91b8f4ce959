"""One model, one engine, every way of updating it: peers, this project, and the copy that bounds them all."""
