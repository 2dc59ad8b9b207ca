"""The way of a layer's rows to the expert replicas and back."""
