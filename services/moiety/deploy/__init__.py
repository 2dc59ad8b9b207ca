"""The Ray Serve application. The only place that imports Ray."""
