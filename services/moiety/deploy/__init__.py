"""The system on Ray Serve. The only package that imports Ray."""
