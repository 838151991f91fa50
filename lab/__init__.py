"""The bench: command lines, files and devices, scores, intervals."""
