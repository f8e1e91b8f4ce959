"""What a fleet's update costs besides its bytes, by the number of engines: real sidecars, scripted engines."""
