"""The systems that `moiety simulate` compares on one trace."""
