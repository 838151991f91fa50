"""The bench: what every project needs and no paper mentions."""
