"""Editing: change what a picture shows through the noise that makes it."""
