"""Formats of weight files, one file each."""
