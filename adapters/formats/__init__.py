"""Adapter files of other programs: recognised by content, converted in and written out."""
