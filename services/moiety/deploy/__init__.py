"""The system on Ray Serve; the only package that imports Ray."""
