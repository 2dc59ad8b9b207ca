"""`moiety chat`: a conversation in a terminal or through pipes. Needs nothing that a plain `pip install moiety` lacks."""
