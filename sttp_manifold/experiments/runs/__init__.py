"""One run of each kind, what it leaves behind, and where it runs."""
