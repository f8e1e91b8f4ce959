"""Facts about SGLang's HTTP server, checked on real and scripted engines alike."""
