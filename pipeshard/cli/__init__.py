"""The commands of `pipeshard`, one module each; what they share is in common.py. Not an API."""
